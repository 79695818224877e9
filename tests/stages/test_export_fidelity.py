"""What is compared between a student and its export, and what the limits let through."""

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
from coldstill.stages.export.contract import Limits
from coldstill.stages.export.documents import sampled_documents
from coldstill.stages.export.fidelity import Fidelity, check
from coldstill.stages.export.torch_runtime import TorchRuntime
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
    """A teacher, and a held-out store with its whole distribution."""
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


class Other:
    """A runtime that says something else by a known distance, and forgets a part of its past."""

    title, is_own, elsewhere = "other", True, None

    def __init__(self, student: TorchRuntime, shift: float, forget: float = 0.0) -> None:
        self.student, self.shift, self.forget = student, shift, forget

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        logits, after = self.student.step(tokens_T, cache)
        logits = logits.copy()
        logits[:, 0] += self.shift + (self.forget if cache is not None else 0.0)
        return logits, after

    def close(self) -> None: ...


def test_the_sample_is_every_document_of_a_small_store_once(heldout: StoreReader) -> None:
    documents = sampled_documents(heldout)
    block = heldout.read(np.arange(len(heldout)))
    sequences = block.sequences
    found = sorted(document.tokens_T.tolist() for document in documents)
    expected = []
    for row in range(len(sequences)):
        pieces = np.split(sequences.tokens[row], sequences.document_starts[row][1:])
        expected += [piece.tolist() for piece in pieces if len(piece) > 1]
    assert found == sorted(expected)
    assert sum(len(d.positions_M) for d in documents) == heldout.positions
    for document in documents:
        labels = document.tokens_T[document.positions_M + 1]
        assert document.target.labels.tolist() == labels.tolist()


def test_a_sample_ends_when_there_is_enough_and_is_always_the_same(heldout: StoreReader) -> None:
    few, again = (sampled_documents(heldout, tokens=60) for _ in range(2))
    assert 0 < len(few) < len(sampled_documents(heldout))
    assert [d.tokens_T.tolist() for d in few] == [d.tokens_T.tolist() for d in again]


def test_a_student_is_what_it_is(student: TorchRuntime, heldout: StoreReader) -> None:
    fidelity = check(student, student, sampled_documents(heldout), VOCABULARY).fidelity
    assert (fidelity.largest_difference, fidelity.kl, fidelity.agreement) == (0.0, 0.0, 1.0)
    assert fidelity.cached_difference < 1e-4


def test_distances_are_those_of_the_dense_formulas(
    student: TorchRuntime, heldout: StoreReader
) -> None:
    documents, shift = sampled_documents(heldout), 2.0
    fidelity = check(student, Other(student, shift), documents, VOCABULARY).fidelity
    ours, theirs = [], []
    for document in documents:
        logits = torch.from_numpy(student.step(document.tokens_T)[0]).double()
        ours.append(logits.log_softmax(1))
        other = logits.clone()
        other[:, 0] += shift
        theirs.append(other.log_softmax(1))
    p, q = torch.cat(ours), torch.cat(theirs)
    assert fidelity.positions == len(p)
    entropy = -float((p.exp() * p).sum(1).mean())
    assert fidelity.information == pytest.approx(math.log(VOCABULARY) - entropy, rel=1e-6)
    assert fidelity.largest_difference == pytest.approx(float((p - q).abs().max()), rel=1e-6)
    assert fidelity.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-6)
    assert fidelity.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())


def test_figures_are_those_of_an_evaluation(
    folder: Path, student: TorchRuntime, heldout: StoreReader
) -> None:
    checked = check(student, student, sampled_documents(heldout), VOCABULARY)
    whole = evaluate_student("s", folder / "student", heldout)
    for name in ("loss", "kl", "agreement", "accuracy", "acceptance", "ece", "perplexity"):
        assert checked.figures[name] == pytest.approx(getattr(whole, name), rel=1e-4), name
    assert checked.figures["positions"] == whole.positions


def test_a_cache_that_forgets_is_seen_though_all_at_once_is_right(
    student: TorchRuntime, heldout: StoreReader
) -> None:
    documents = sampled_documents(heldout)
    fidelity = check(student, Other(student, 0.0, forget=1.0), documents, VOCABULARY).fidelity
    assert fidelity.largest_difference == 0.0
    assert fidelity.cached_difference > 0.1


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


def test_logits_of_other_tokens_are_refused(student: TorchRuntime, heldout: StoreReader) -> None:
    class Wider(Other):
        def step(
            self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
        ) -> tuple[NDArray[Any], Any]:
            logits, after = super().step(tokens_T, cache)
            return np.pad(logits, ((0, 0), (0, 16)), constant_values=-9.0), after

    with pytest.raises(ColdstillError, match="gives logits of 336 tokens, where there are 320"):
        check(student, Wider(student, 0.0), sampled_documents(heldout), VOCABULARY)


def test_documents_are_cut_with_the_labels_that_they_keep(heldout: StoreReader) -> None:
    for whole in sampled_documents(heldout):
        cut = whole.within(7)
        assert cut.tokens_T.tolist() == whole.tokens_T[:7].tolist()
        kept = [
            place for place in whole.positions_M.tolist() if place + 1 < min(7, len(whole.tokens_T))
        ]
        assert cut.positions_M.tolist() == kept
        assert cut.target.labels.tolist() == cut.tokens_T[cut.positions_M + 1].tolist()


@pytest.mark.parametrize(
    ("name", "value", "said"),
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
def test_each_limit_refuses_by_itself(name: str, value: float, said: str) -> None:
    assert SOUND.excess(LIMITS) is None
    changed: Any = {name: value}
    assert replace(SOUND, **changed).excess(LIMITS) == said


def test_what_is_no_number_is_not_lost_among_documents(
    student: TorchRuntime, heldout: StoreReader
) -> None:
    documents = sampled_documents(heldout)

    class Broken(Other):
        def step(
            self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
        ) -> tuple[NDArray[Any], Any]:
            logits, after = super().step(tokens_T, cache)
            if np.array_equal(tokens_T, documents[0].tokens_T):
                logits[0, 5] = np.nan
            return logits, after

    fidelity = check(student, Broken(student, 0.0), documents, VOCABULARY).fidelity
    assert fidelity.excess(LIMITS) is not None
    assert math.isnan(fidelity.largest_difference)
