"""Takes one tiny model of every family of transformers through every step of a run.

A step has two allowed outcomes: it works and agrees with the model itself, or it is refused in one
line. As a program this module writes the table of all families with all exports:

    python tests/families.py TABLE.md [FAMILY ...]
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.alignment import labels
from coldstill.data.errors import ColdstillError
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Block, Capture, Sequences, Targets
from coldstill.stages.capture.forward import capture_batch
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.config import (
    ArchitectureConfig,
    CorpusConfig,
    LoraConfig,
    TokenizerConfig,
)
from coldstill.stages.corpus.train_tokenizer import train_tokenizer
from coldstill.stages.export import FORMATS
from coldstill.stages.export.contract import LoadedStudent, expect_supported
from coldstill.stages.models.building import build_model
from coldstill.stages.models.isolation import choose_isolation, packs
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.planning.model_sizes import sizes_of_table
from coldstill.stages.students.adapters import adapt, merge_adapters
from coldstill.stages.students.pruning.anatomy import anatomy_of
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.students.pruning.cutting import cut, kept_parts
from coldstill.stages.students.pruning.layers import cut_to_layers
from coldstill.stages.students.pruning.shapes import target_sizes
from coldstill.stages.training.batch import collate
from coldstill.stages.training.objective import attach_objective, terms_of
from conftest import VOCABULARY, sentences
from small_pruning import random_importance
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstill.stages.models.inputs import Isolation

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
STEPS = ("plan", "build", "capture", "student", "lora", "layers", "prune", *FORMATS)
WORKS = "works"
LENGTH = 32
_CAPTURE = Capture(head=4, tail=2)
_TRIES: tuple[dict[str, Any], ...] = (
    {},
    {"tied": False},
    {"feed_forward": None},
    {"feed_forward": None, "tied": False},
    {"feed_forward": None, "heads": 1},
    {"layers": 4},
    {"hidden": 256, "heads": 4, "feed_forward": None},
)
"""Changed sizes for families that do not take the usual ones."""


@dataclass(frozen=True, slots=True)
class Walk:
    """The outcome of each step: that it works, or its error line."""

    family: str
    steps: dict[str, str] = field(default_factory=dict)
    isolations: list[Isolation] = field(default_factory=list)

    @property
    def packs(self) -> bool:
        """Whether documents may share a sequence."""
        return all(map(packs, self.isolations))

    def tried(self, step: str, action: Callable[[], Any]) -> Any:
        """The result of a step; None if it is refused in one line."""
        try:
            found = action()
        except ColdstillError as error:
            self.steps[step] = str(error)
            return None
        self.steps[step] = WORKS
        return found


def walk(family: str, tokenizer: Any, folder: Path, formats: tuple[str, ...] = ()) -> Walk:
    """Take a family through all steps.

    formats  exports to write and open again; the others are only checked for support
    """
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    walked = Walk(family)
    table = _table(family, vocabulary, walked)
    if table is None:
        return walked
    model = walked.tried("build", lambda: build_model(table, tokenizer, LENGTH, 1, "student"))
    if model is None:
        return walked
    _make_sure(model)
    parameters = sizes_of_table(table, vocabulary, LENGTH).parameters
    assert parameters == model.num_parameters()
    teacher = walked.tried("capture", lambda: _captured(model, vocabulary, walked))
    if teacher is None:
        return walked
    walked.tried("student", lambda: _learns(model, vocabulary))
    walked.tried("lora", lambda: _adapted(model, vocabulary))
    walked.tried("layers", lambda: _logits(cut_to_layers(copy.deepcopy(model), [1], "student")))
    walked.tried("prune", lambda: _pruned(model))
    source = _source(model, tokenizer, vocabulary, folder)
    for name in FORMATS:
        walked.tried(name, partial(_exported, name, source, formats))
    assert not any("\n" in line for line in walked.steps.values())
    return walked


def _table(family: str, vocabulary: int, walked: Walk) -> ArchitectureConfig | None:
    """The first sizes that the family accepts."""
    usual = ArchitectureConfig(family=family, layers=2, hidden=32, heads=2, feed_forward=48)
    for change in _TRIES:
        table = replace(usual, **change)
        walked.tried("plan", partial(sizes_of_table, table, vocabulary, LENGTH))
        if walked.steps["plan"] == WORKS:
            return table
    return None


@torch.no_grad()
def _make_sure(model: Any) -> None:
    """Enlarge the random weights, so that distributions are not flat."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3.0)


def _sequences(vocabulary: int, *, packed: bool) -> Sequences:
    """Two documents, in one sequence or two."""
    random = np.random.default_rng(0)
    documents = [random.integers(3, vocabulary, length) for length in (9, 7)]
    rows = [np.concatenate(documents)] if packed else documents
    starts = [[0, 9]] if packed else [[0], [0]]
    places = [[*range(8), *range(9, 15)]] if packed else [[*range(8)], [*range(6)]]
    return Sequences(
        ids=np.arange(len(rows)),
        tokens=Ragged.from_rows(rows, np.int32),
        document_starts=Ragged.from_rows(starts, np.int32),
        document_ids=Ragged.from_rows([[0, 1]] if packed else [[0], [1]], np.int32),
        positions=Ragged.from_rows(places, np.int32),
        hashes=np.zeros(len(rows), np.uint64),
    )


@torch.no_grad()
def _alone(model: Any, vocabulary: int) -> torch.Tensor:
    """[M, V] log-probs at each position, computed for one document at a time."""
    found = []
    for tokens in _sequences(vocabulary, packed=False).tokens:
        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        found.append(model(input_ids=ids, use_cache=False).logits[0, :-1, :vocabulary])
    return torch.cat(found).float().log_softmax(1)


def _captured(model: Any, vocabulary: int, walked: Walk) -> Targets:
    """The record of both documents, which must equal each document alone."""
    isolation = choose_isolation(model, vocabulary, LENGTH)
    walked.isolations.append(isolation)
    head = connect_head(model, vocabulary)
    sequences = _sequences(vocabulary, packed=packs(isolation))
    found = capture_batch(Teacher(head=head, isolation=isolation), sequences, _CAPTURE)
    own = _alone(model, vocabulary)
    rows = torch.arange(len(own))
    expected = own[rows, torch.from_numpy(labels(sequences).astype(np.int64))]
    _close(torch.from_numpy(found.label_logprob), expected)
    heads = torch.from_numpy(found.head_ids.astype(np.int64))
    _close(torch.from_numpy(found.head_logprobs), own.gather(1, heads.view(len(own), -1)))
    return found


def _learns(model: Any, vocabulary: int) -> None:
    """The loss must be the mean of the label log-probs and have a gradient."""
    student = copy.deepcopy(model)
    loss, count = _loss(student, vocabulary)
    torch.autograd.backward(loss)
    assert any(weight.grad is not None and weight.grad.any() for weight in student.parameters())
    labels_M = torch.from_numpy(labels(_sequences(vocabulary, packed=False)).astype(np.int64))
    own = _alone(model, vocabulary)[torch.arange(count), labels_M]
    _close(loss.detach() / count, -own.mean())


def _loss(student: Any, vocabulary: int) -> tuple[torch.Tensor, int]:
    isolation = choose_isolation(student, vocabulary, LENGTH)
    head = connect_head(student, vocabulary)
    capture = Capture(head=0, tail=0)
    terms = terms_of(ObjectiveConfig(kl=0.0, cross_entropy=1.0), capture, "student")
    attach_objective(head, terms)
    sequences = _sequences(vocabulary, packed=packs(isolation))
    targets = Targets.empty(len(sequences.positions.values))
    block = Block(sequences=sequences, targets=targets, capture=capture)
    batch = collate((block,), isolation, student.dtype)
    return student(batch)["loss"], len(batch.targets)


def _adapted(model: Any, vocabulary: int) -> None:
    """Adapters must start without effect, have gradients and disappear when merged."""
    student = copy.deepcopy(model)
    before = _logits(student)
    wrapper = adapt(student, LoraConfig(rank=2), 0, "student.lora")
    _close(_logits(student), before)
    loss, _ = _loss(student, vocabulary)
    torch.autograd.backward(loss)
    learned = [weight for weight in student.parameters() if weight.requires_grad]
    assert any(weight.grad is not None and weight.grad.any() for weight in learned)
    del student.forward
    merge_adapters(wrapper)
    _close(_logits(student), before)


def _pruned(model: Any) -> None:
    """Pruning must give the requested sizes."""
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    heads = getattr(model.config, "num_attention_heads", None)
    anatomy = anatomy_of(model.config.model_type, heads, shapes, "student.prune")
    whole = anatomy.parameters(anatomy.sizes)
    sizes = target_sizes(anatomy, PruneConfig(layers=1), whole, "student.prune")
    kept = kept_parts(anatomy, sizes, random_importance(anatomy.sizes, 0))
    smaller = cut(copy.deepcopy(model), anatomy, kept, "student.prune")
    assert smaller.num_parameters() == anatomy.parameters(sizes)
    assert _logits(smaller).isfinite().all()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(3, 12)[None], use_cache=False).logits
    return logits


def _source(model: Any, tokenizer: Any, vocabulary: int, folder: Path) -> LoadedStudent:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return LoadedStudent(
        name="student",
        folder=folder / "model",
        model=model,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        length=LENGTH,
        texts=("the teacher speaks once",),
    )


def _exported(name: str, source: LoadedStudent, formats: tuple[str, ...]) -> None:
    """An export is refused, or its runtime gives the student's log-probabilities."""
    form = FORMATS[name]
    expect_supported(name, form, source)
    if name not in formats:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        base = None
        if form.base is not None:
            base = Path(scratch) / "base"
            base.mkdir()
            FORMATS[form.base].write(source, base)
        form.write(source, folder, base)
        runtime = form.open(source, folder)
        theirs, _ = runtime.step(np.arange(3, 12))
        runtime.close()
    ours = _logits(source.model)[0].log_softmax(1)
    difference = torch.from_numpy(theirs.copy()).log_softmax(1) - ours
    assert float(difference.abs().max()) <= form.limits.logprob, name


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-4, rtol=1e-3)


def table_of(walks: list[Walk]) -> str:
    """All walks as Markdown; error lines are numbered below the table."""
    head = "| family | " + " | ".join(STEPS) + " |\n" + "|---" * (len(STEPS) + 1) + "|\n"
    notes: dict[str, int] = {}
    rows = []
    for each in walks:
        cells = []
        for step in STEPS:
            line = each.steps.get(step, "")
            if line and line != WORKS:
                cells.append(f"({notes.setdefault(line, len(notes) + 1)})")
            else:
                cells.append(line)
        rows.append(f"| {each.family} | " + " | ".join(cells) + " |")
    below = "\n".join(f"{number}. {line}" for line, number in notes.items())
    return f"{head}" + "\n".join(rows) + f"\n\n{below}\n"


def main(path: Path, families: tuple[str, ...], formats: tuple[str, ...]) -> None:
    """Walk all families with all exports and write the table; faults do not stop the program."""
    walks = []
    with tempfile.TemporaryDirectory() as scratch:
        texts = Path(scratch) / "texts.txt"
        texts.write_text("\n".join(sentences(60)), encoding="utf-8")
        corpus = CorpusConfig(files=(str(texts),))
        folder = Path(scratch) / "tokenizer"
        train_tokenizer(folder, TokenizerConfig(vocabulary=VOCABULARY), corpus, Path(scratch))
        tokenizer = load_tokenizer(str(folder), "tokenizer")
        for family in families:
            walked = Walk(family)
            try:
                walked = walk(family, tokenizer, Path(scratch) / family, formats)
            except Exception as error:  # a fault that this program is to find
                walked.steps["plan"] = f"FAULT {type(error).__name__}: {str(error)[:200]}"
            walks.append(walked)
            print(family, walked.steps, flush=True)
            path.write_text(table_of(walks), encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), tuple(sys.argv[2:]) or FAMILIES, tuple(FORMATS))
