"""The comparison of an export with its student, and the limits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.evaluate import evaluate_student
from coldstill.stages.export.checks import Fidelity, compare
from coldstill.stages.export.contract import Limits, Runtime
from coldstill.stages.export.reference import TorchRuntime, sampled_documents
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.vocabulary import without_padding
from conftest import VOCABULARY
from small_runs import capture_store, prepare, save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from numpy.typing import NDArray


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, and a held-out store with the whole distribution."""
    root = tmp_path_factory.mktemp("fidelity")
    corpus = prepare(root / "corpus", tokenizer)
    save_teacher(root / "teacher", tokenizer)
    save_teacher(root / "student", tokenizer, seed=2)
    capture = Capture(head=VOCABULARY, tail=0)
    capture_store(corpus, root / "teacher", root / "heldout", capture, split="heldout")
    return root


@pytest.fixture(scope="module")
def heldout(folder: Path) -> StoreReader:
    return open_store(folder / "heldout")


@pytest.fixture(scope="module")
def student(folder: Path) -> TorchRuntime:
    model = load_model(str(folder / "student"), "test", precision="fp32")
    return TorchRuntime(without_padding(model, VOCABULARY), "torch")


class Faulty(Runtime):
    """The student with changed logits."""

    title = "faulty"

    def __init__(
        self,
        student: TorchRuntime,
        shift: float = 0.0,
        cached_shift: float = 0.0,
        padding: int = 0,
        broken: NDArray[Any] | None = None,
    ) -> None:
        """Shift token 0, or only after a cache; append rows; give NaN for one document."""
        self.student, self.shift, self.cached_shift = student, shift, cached_shift
        self.padding, self.broken = padding, broken

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        logits, after = self.student.step(tokens_T, cache)
        logits = np.pad(logits, ((0, 0), (0, self.padding)), constant_values=-9.0)
        logits[:, 0] += self.shift + (self.cached_shift if cache is not None else 0.0)
        if self.broken is not None and np.array_equal(tokens_T, self.broken):
            logits[0, 5] = np.nan
        return logits, after


def test_the_sample_has_every_document_of_a_small_store_once(heldout: StoreReader) -> None:
    documents = sampled_documents(heldout)
    sequences = heldout.read(np.arange(len(heldout))).sequences
    found = sorted(document.tokens_T.tolist() for document in documents)
    expected = []
    for row in range(len(sequences)):
        pieces = np.split(sequences.tokens[row], sequences.document_starts[row][1:])
        expected += [piece.tolist() for piece in pieces if len(piece) > 1]
    assert found == sorted(expected)
    assert sum(len(d.positions_M) for d in documents) == heldout.positions
    for whole in documents:
        labels = whole.tokens_T[whole.positions_M + 1]
        assert whole.target.labels.tolist() == labels.tolist()
        # a cut document keeps the positions whose label it keeps
        cut = whole.within(7)
        assert cut.tokens_T.tolist() == whole.tokens_T[:7].tolist()
        kept = whole.positions_M[whole.positions_M + 1 < min(7, len(whole.tokens_T))]
        assert cut.positions_M.tolist() == kept.tolist()
        assert cut.target.labels.tolist() == cut.tokens_T[cut.positions_M + 1].tolist()

    few, again = (sampled_documents(heldout, tokens=60) for _ in range(2))
    assert 0 < len(few) < len(documents)
    assert [d.tokens_T.tolist() for d in few] == [d.tokens_T.tolist() for d in again]


def test_figures_of_the_student_itself_are_those_of_its_evaluation(
    folder: Path, student: TorchRuntime, heldout: StoreReader
) -> None:
    compared = compare(student, student, sampled_documents(heldout), VOCABULARY)
    fidelity = compared.fidelity
    assert (fidelity.largest_difference, fidelity.kl, fidelity.agreement) == (0.0, 0.0, 1.0)
    assert fidelity.cached_difference < 1e-4
    whole = evaluate_student("s", folder / "student", heldout)
    for name in ("loss", "kl", "agreement", "accuracy", "acceptance", "ece", "perplexity"):
        assert compared.figures[name] == pytest.approx(getattr(whole, name), rel=1e-4), name
    assert compared.figures["positions"] == whole.positions


def test_distances_equal_the_dense_formulas(student: TorchRuntime, heldout: StoreReader) -> None:
    documents, shift = sampled_documents(heldout), 2.0
    fidelity = compare(student, Faulty(student, shift), documents, VOCABULARY).fidelity
    logits = [student.step(document.tokens_T)[0] for document in documents]
    p = torch.from_numpy(np.concatenate(logits)).double()
    q = p.clone()
    q[:, 0] += shift
    p, q = p.log_softmax(1), q.log_softmax(1)
    assert fidelity.positions == len(p)
    entropy = -float((p.exp() * p).sum(1).mean())
    assert fidelity.information == pytest.approx(math.log(VOCABULARY) - entropy, rel=1e-6)
    assert fidelity.largest_difference == pytest.approx(float((p - q).abs().max()), rel=1e-6)
    assert fidelity.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-6)
    assert fidelity.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())


SOUND = Fidelity(
    documents=1,
    positions=10,
    largest_difference=0.01,
    kl=1e-6,
    information=1.0,
    agreement=0.99,
    cached_difference=0.01,
)
LIMITS = Limits(logprob=0.1, kl=1e-4, share=0.01, cached=0.1, agreement=0.9)


def test_a_wrong_cache_other_tokens_and_nan_are_found(
    student: TorchRuntime, heldout: StoreReader
) -> None:
    documents = sampled_documents(heldout)
    forgets = Faulty(student, cached_shift=1.0)
    fidelity = compare(student, forgets, documents, VOCABULARY).fidelity
    assert fidelity.largest_difference == 0.0
    assert fidelity.cached_difference > 0.1
    with pytest.raises(ColdstillError, match="gives logits of 336 tokens, expected 320"):
        compare(student, Faulty(student, padding=16), documents, VOCABULARY)
    broken = Faulty(student, broken=documents[0].tokens_T)
    fidelity = compare(student, broken, documents, VOCABULARY).fidelity
    assert math.isnan(fidelity.largest_difference)
    assert fidelity.excess(LIMITS) is not None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("largest_difference", 0.2, "largest difference 0.2 (at most 0.1)"),
        ("kl", 1e-3, "KL 0.001 (at most 0.0001)"),
        ("information", 1e-5, "KL 1e-06 (at most 1e-07)"),
        ("cached_difference", 5.0, "largest difference with its cache 5 (at most 0.1)"),
        ("agreement", 0.5, "top-1 agreement 50.0% (at least 90.0%)"),
        ("largest_difference", math.nan, "largest difference nan (at most 0.1)"),
        ("kl", math.inf, "KL inf (at most 0.0001)"),
    ],
)
def test_each_limit_refuses_alone(name: str, value: float, expected: str) -> None:
    assert SOUND.excess(LIMITS) is None
    changed: Any = {name: value}
    assert replace(SOUND, **changed).excess(LIMITS) == expected
