"""Trains a new teacher on the corpus by cross-entropy."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError
from ..data.files import whole_folder
from ..data.schema import Capture
from .config import ObjectiveConfig
from .evaluation.quality import heldout_loss
from .libraries import asking
from .models.building import build_model, unused_heads
from .models.device import best_device
from .models.ends import corpus_ends, report_ends, with_end
from .models.isolation import packs
from .models.isolation_choice import choose_isolation
from .models.output_head import connect_head
from .models.vocabulary import vocabulary_size
from .ranks import rank, wait_for_all
from .report import Report, Reporter, silent
from .training.checkpoints import full_disk_errors
from .training.feed import CorpusDataset
from .training.loop import TrainingJob, train
from .training.objective import terms_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..data.prepared import SequenceFile
    from .config import ArchitectureConfig, TrainConfig
    from .evaluation.quality import Heldout
    from .models.isolation import Isolation
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
    settings   stored in the checkpoints

    Raises
        ColdstillError: the model cannot be built, or it cannot keep packed documents apart
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
