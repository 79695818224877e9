"""Trains a teacher on the corpus by cross-entropy: a new one, or an existing one before capture.

An existing teacher that never saw text like the corpus guides students worse than one that did. Its
short fine-tuning is called teacher correction (Sreenivas et al., "LLM Pruning and Distillation in
Practice", arXiv 2408.11796). The held-out loss is measured before and after.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data.errors import ColdstillError
from ..data.files import read_json, whole_folder, write_json
from ..data.schema import Capture
from .evaluation.quality import heldout_loss
from .libraries import asking
from .models.building import build_model, unused_heads
from .models.device import best_device
from .models.ends import corpus_ends, repair_generation, report_ends, with_end
from .models.isolation import choose_isolation, packs
from .models.output_head import connect_head
from .models.vocabulary import vocabulary_size
from .objective_config import ObjectiveConfig
from .ranks import rank, wait_for_all
from .report import Report, Reporter, silent
from .students.adapters import adapt, adapted_layers, merge_adapters
from .training.checkpoints import full_disk_errors
from .training.feed import CorpusDataset
from .training.loop import TrainingJob, train
from .training.objective import terms_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ..data.prepared import SequenceFile
    from .config import ArchitectureConfig, LoraConfig, TrainConfig
    from .evaluation.quality import Heldout
    from .models.inputs import Isolation
    from .models.output_head import OutputHead

STAGE = "train-teacher"


def train_teacher(
    folder: Path,
    architecture: ArchitectureConfig,
    config: TrainConfig,
    tokenizer: Any,
    sequences: SequenceFile,
    *,
    sequence_length: int,
    together: bool,
    seed: int,
    separator: Sequence[int] = (),
    heldout: Heldout | None = None,
    report: Reporter = silent,
    begin: Callable[[], None] = lambda: None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Build a model, train it and write it to `folder/model`.

    separator  ids after each plain document
    heldout    sequences on which the loss is measured at the end, if given
    begin      called once, after all checks and before anything is written
    """
    report(Report(stage=STAGE, doing="make the model"))
    model = build_model(architecture, tokenizer, sequence_length, seed, "teacher.architecture")
    if note := unused_heads(architecture, "teacher.architecture"):
        report(Report(stage=STAGE, note=note, warning=True))
    model.to(best_device())
    vocabulary = vocabulary_size(tokenizer)
    isolation = choose_isolation(
        model,
        vocabulary,
        sequence_length,
        together=together,
        where="teacher.architecture",
        report=report,
    )
    if together and not packs(isolation):
        raise ColdstillError(
            f"teacher.architecture: a {architecture.family!r} model cannot keep packed documents "
            "apart; set corpus.pack = false"
        )
    head = connect_head(model, vocabulary, report)
    learn_corpus(
        head,
        sequences,
        isolation,
        report,
        config=config,
        sequence_length=sequence_length,
        seed=seed,
        folder=folder,
        begin=begin,
        settings=settings,
    )
    save_teacher(model, tokenizer, sequences, separator, folder, report)
    report(Report(stage=STAGE, note=f"{model.num_parameters():,} parameters trained"))
    if heldout is not None:
        loss = heldout_loss(head, heldout, isolation, f"{STAGE} heldout", report)
        report(Report(stage=STAGE, note=f"held-out loss {loss:.3f}"))


def learn_corpus(
    head: OutputHead,
    sequences: SequenceFile,
    isolation: Isolation,
    report: Reporter,
    **settings: Any,
) -> None:
    """Train a model in place by cross-entropy; `settings` are the other fields of `TrainingJob`."""
    capture = Capture(head=0, tail=0)
    job = TrainingJob(
        stage=STAGE,
        head=head,
        dataset=CorpusDataset(sequences),
        isolation=isolation,
        capture=capture,
        terms=terms_of(ObjectiveConfig(kl=0.0, cross_entropy=1.0), capture, "teacher"),
        **settings,
    )
    train(job, report)


def save_teacher(
    model: Any,
    tokenizer: Any,
    sequences: SequenceFile,
    separator: Sequence[int],
    folder: Path,
    report: Reporter,
) -> None:
    """Write a trained teacher with its tokenizer and measured end tokens to `folder/model`."""
    ends = corpus_ends(sequences, tokenizer, separator)
    report_ends(model, tokenizer, ends, STAGE, report)
    report(Report(stage=STAGE, doing="save the model"))
    tokenizer = with_end(copy.deepcopy(tokenizer), ends.tokens)
    if rank() == 0:
        with whole_folder(folder / "model") as scratch, full_disk_errors(folder / "model"):
            with asking("transformers", "save the teacher", where=str(folder)):
                model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
    wait_for_all()  # the next stage needs the saved model


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
    heldout: Heldout
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


def correct_teacher(job: Correction, report: Reporter = silent) -> None:
    """Fine-tune the model and write it to `folder/model` as an ordinary checkpoint.

    Adapters are merged, and every tensor keeps its original dtype. Both losses are measured in that
    dtype.
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
        merge_adapters(adapters)
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
