"""Teacher correction: a short fine-tuning of an existing teacher on the corpus before capture.

A teacher that never saw text like the corpus guides students worse than one that did (Sreenivas et
al., "LLM Pruning and Distillation in Practice", arXiv 2408.11796, which names it teacher
correction). The held-out loss is measured before and after.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.files import read_json, write_json
from .evaluation.quality import heldout_loss
from .models.generation import repair_generation
from .models.output_head import connect_head
from .models.vocabulary import vocabulary_size
from .report import Report, Reporter, silent
from .students.adapters import adapt, adapted_layers, merge
from .train_teacher import STAGE, learn_corpus, save_teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ..data.prepared import SequenceFile
    from .config import LoraConfig, TrainConfig
    from .evaluation.quality import Heldout
    from .models.isolation import Isolation
    from .models.output_head import OutputHead

LORA = "teacher.lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """The model to correct and the settings of its training."""

    model: Any
    """The model in the precision of its checkpoint, on the training device."""
    tokenizer: Any
    isolation: Isolation
    lora: LoraConfig | None
    """Adapters to train on frozen weights; None trains all weights."""
    config: TrainConfig
    sequences: SequenceFile
    """The training sequences."""
    heldout: Heldout
    """The sequences on which the loss is measured."""
    sequence_length: int
    seed: int
    separator: Sequence[int] = ()
    """Ids after each plain document."""
    folder: Path
    """Folder for checkpoints, metrics and the model."""
    record: Path
    """File for the losses before and after."""
    begin: Callable[[], None] = lambda: None
    """Called once, after all checks and before anything is written."""
    settings: dict[str, Any] | None = None
    """Stored in the checkpoints."""


def correct_teacher(job: Correction, report: Reporter = silent) -> None:
    """Fine-tune the model and write it to `folder/model` as an ordinary checkpoint.

    Adapters are merged, and every tensor keeps its original dtype. Both losses are measured in that
    dtype.

    Raises
        ColdstillError: adapters do not fit the model, the trainer refuses its settings, or a loss
            is NaN or infinite
    """
    model = job.model
    if job.lora is not None:
        adapted_layers(model, job.lora.targets, LORA)  # refuse wrong targets before long work
    if note := repair_generation(model):
        report(Report(stage=STAGE, note=note, warning=True))
    head = connect_head(model, vocabulary_size(job.tokenizer), report)
    before = _loss_before(job, head, report)
    own = {name: tensor.dtype for name, tensor in _tensors(model)}
    config = copy.deepcopy(model.config)  # the trainer changes it
    learned = _learn(job, head, before, report)
    for name, tensor in _tensors(model):  # tied tensors stay one tensor
        tensor.data = tensor.data.to(own[name])
    model.config = config
    after = _loss(job, head, "after", report)
    # the model is written last: its presence marks the correction as done
    write_json(job.record, _figures(job, before=before, after=after, trained=learned))
    save_teacher(model, job.tokenizer, job.sequences, job.separator, job.folder, report)
    size = f"{model.num_parameters():,} parameters"
    merged = f"{learned:,} adapter weights trained and merged into {size}"
    report(Report(stage=STAGE, note=f"{size} trained" if job.lora is None else merged))
    report(_verdict(before, after))


def _learn(job: Correction, head: OutputHead, before: float, report: Reporter) -> int:
    """Train the model in place; returns the number of trained weights."""
    model = job.model
    if job.lora is None or model.dtype == torch.float16:
        # An update is often smaller than the gap between two bf16 numbers and would be rounded
        # away, so all weights are trained in fp32; train.precision sets the dtype of computation.
        # Frozen weights keep their dtype (adapters are fp32 anyway), except in fp16, where the
        # gradients that pass through them would underflow.
        model.float()
    adapters = None if job.lora is None else adapt(model, job.lora, job.seed, LORA)

    def begin() -> None:
        job.begin()
        write_json(job.record, _figures(job, before=before))

    learn_corpus(
        head,
        job.sequences,
        job.isolation,
        report,
        config=job.config,
        sequence_length=job.sequence_length,
        seed=job.seed,
        folder=job.folder,
        begin=begin,
        settings=job.settings,
    )
    learned: int = sum(w.numel() for w in model.parameters() if w.requires_grad)
    if adapters is not None:
        merge(adapters)
    return learned


def _loss_before(job: Correction, head: OutputHead, report: Reporter) -> float:
    """The loss before training, read from an interrupted correction or measured now."""
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
    losses = f"held-out loss {before:.3f} before, {after:.3f} after"
    if after <= before:
        return Report(stage=STAGE, note=losses)
    advice = "remove teacher.train, or lower its learning_rate or steps"
    return Report(stage=STAGE, note=f"{losses}: the loss increased; {advice}", warning=True)
