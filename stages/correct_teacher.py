"""Teacher correction: a short fine-tuning of an existing model on the corpus before it is captured.

A teacher that never saw text like the corpus guides students worse than one that has (Sreenivas et
al., "LLM Pruning and Distillation in Practice", arXiv 2408.11796, call it teacher correction).
Whether it helped is measured, not hoped: held-out loss before and after.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.files import read_json, write_json
from ..data.schema import Capture
from .config import ObjectiveConfig
from .evaluation.heldout_loss import heldout_loss
from .models.ends import corpus_ends, report_ends, with_end
from .models.generation import repair_generation
from .models.output_head import connect_head
from .models.vocabulary import vocabulary_size
from .report import Report, Reporter, silent
from .students.adapters import adapt, adapted_layers, merge
from .train_teacher import STAGE, save_teacher
from .training.feed import CorpusDataset
from .training.loop import TrainingJob, train
from .training.objective import terms_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ..data.prepared import SequenceFile
    from .config import LoraConfig, TrainConfig
    from .evaluation.heldout_loss import Heldout
    from .models.isolation import Isolation
    from .models.output_head import OutputHead

LORA = "teacher.lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One model to be corrected, and how."""

    model: Any
    """Loaded in its own precision, on the device it is trained on."""
    tokenizer: Any
    isolation: Isolation
    lora: LoraConfig | None
    """Adapters on frozen weights; all weights are trained without."""
    config: TrainConfig
    sequences: SequenceFile
    """What it learns from."""
    heldout: Heldout
    """What it is measured on."""
    sequence_length: int
    seed: int
    separator: Sequence[int] = ()
    """What was put after each plain document."""
    folder: Path
    """Where checkpoints, metrics and the model go."""
    record: Path
    """The figures before and after."""
    begin: Callable[[], None] = lambda: None
    """Called once, when everything is checked and nothing is written yet."""
    settings: dict[str, Any] | None = None
    """What its checkpoints say of it."""


def correct_teacher(job: Correction, report: Reporter = silent) -> None:
    """Fine-tune the model; write it to `folder/model`, which then is whole.

    It is an ordinary checkpoint: adapters are merged, and every tensor has the precision it came
    in. Both losses are those of a checkpoint, in that precision.

    Raises
        ColdstillError: adapters that cannot be, settings the trainer refuses, a loss that is no
            number
    """
    model = job.model
    if job.lora is not None:
        adapted_layers(model, job.lora.targets, LORA)  # refused before anything takes time
    if note := repair_generation(model):
        report(Report(stage=STAGE, note=note, warning=True))
    head = connect_head(model, vocabulary_size(job.tokenizer), report)
    before = _loss_before(job, head, report)
    own = {name: tensor.dtype for name, tensor in _tensors(model)}
    config = copy.deepcopy(model.config)  # the trainer leaves settings of its own in it
    learned = _learn(job, head, before, report)
    for name, tensor in _tensors(model):  # tied ones are one tensor and stay it
        tensor.data = tensor.data.to(own[name])
    model.config = config
    after = _loss(job, head, "after", report)
    # the model last: its presence says that there is nothing left to do
    write_json(job.record, _figures(job, before=before, after=after, trained=learned))
    ends = corpus_ends(job.sequences, job.tokenizer, job.separator)
    report_ends(model, job.tokenizer, ends, STAGE, report)
    report(Report(stage=STAGE, doing="save the model"))
    save_teacher(model, with_end(copy.deepcopy(job.tokenizer), ends.tokens), job.folder)
    size = f"{model.num_parameters():,} parameters"
    merged = f"{learned:,} adapter weights trained and merged into {size}"
    report(Report(stage=STAGE, note=f"{size} trained" if job.lora is None else merged))
    report(_verdict(before, after))


def _learn(job: Correction, head: OutputHead, before: float, report: Reporter) -> int:
    """Train the model in place; how many weights learned."""
    model = job.model
    if job.lora is None or model.dtype == torch.float16:
        # A step is often smaller than the distance between two bf16 numbers and would be rounded
        # away, so all weights are trained in fp32; train.precision decides what computes on them.
        # Frozen weights stay as they are (adapters are fp32 anyway), except in fp16, where the
        # gradients that pass through them would vanish.
        model.float()
    adapters = None if job.lora is None else adapt(model, job.lora, job.seed, LORA)
    capture = Capture(head=0, tail=0)
    train(
        TrainingJob(
            stage=STAGE,
            head=head,
            dataset=CorpusDataset(job.sequences),
            isolation=job.isolation,
            capture=capture,
            terms=terms_of(ObjectiveConfig(kl=0.0, cross_entropy=1.0), capture, "teacher"),
            config=job.config,
            sequence_length=job.sequence_length,
            seed=job.seed,
            folder=job.folder,
            begin=lambda: _begin(job, before),
            settings=job.settings,
        ),
        report,
    )
    learned: int = sum(w.numel() for w in model.parameters() if w.requires_grad)
    if adapters is not None:
        merge(adapters)
    return learned


def _begin(job: Correction, before: float) -> None:
    job.begin()
    write_json(job.record, _figures(job, before=before))


def _loss_before(job: Correction, head: OutputHead, report: Reporter) -> float:
    """The base's loss, as an interrupted correction has measured it, or measured now."""
    count = len(job.heldout.rows)
    if job.record.exists():
        match read_json(job.record):
            case {"before": float() as before, "sequences": int() as was} if was == count:
                return before
    return _loss(job, head, "before", report)


def _loss(job: Correction, head: OutputHead, when: str, report: Reporter) -> float:
    return heldout_loss(head, job.heldout, job.isolation, f"{STAGE} heldout loss {when}", report)


def _figures(job: Correction, **figures: float) -> dict[str, Any]:
    return {
        **figures,
        "sequences": len(job.heldout.rows),
        "method": "full" if job.lora is None else "lora",
    }


def _tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _verdict(before: float, after: float) -> Report:
    said = f"held-out loss {before:.3f} before, {after:.3f} after"
    if after <= before:
        return Report(stage=STAGE, note=said)
    advice = "remove teacher.train, or lower its learning_rate or steps"
    return Report(stage=STAGE, note=f"{said}: worse than it was; {advice}", warning=True)
