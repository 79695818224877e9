"""Figures of students and teachers, and the held-out loss, against dense computation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.data.schema import Capture
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.evaluate import evaluate_student, evaluate_teacher
from coldstill.stages.evaluation.quality import ECE_BINS, Calibration, Heldout, heldout_loss
from coldstill.stages.evaluation.usage import flops_per_token
from coldstill.stages.models import output_head
from coldstill.stages.models.building import build_model
from coldstill.stages.models.isolation import choose_isolation
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.models.output_head import OutputHead, connect_head
from conftest import VOCABULARY, make_model
from small_runs import LENGTH, SmallCorpus, capture_store

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coldstill.data.prepared import SequenceFile
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.evaluation.quality import CalibrationBin
    from coldstill.stages.report import Report


@pytest.fixture(scope="module")
def student(saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with noise on its weights, so that no figure is at its limit."""
    folder = tmp_path_factory.mktemp("student") / "model"
    model = load_model(str(saved_teacher), "student", precision="fp32")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15 * parameter.std())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """The held-out split with the teacher's whole distribution."""
    folder = tmp_path_factory.mktemp("run") / "heldout"
    capture = Capture(head=VOCABULARY, tail=0, tail_logprobs=True)
    return capture_store(corpus, saved_teacher, folder, capture, split="heldout")


@torch.no_grad()
def logits(folder: Path, store: StoreReader) -> tuple[torch.Tensor, torch.Tensor]:
    model = load_model(str(folder), "model", precision="fp32")
    sequences = store.read(np.arange(len(store))).sequences
    logits_MV, labels_M = dense.logits_alone(model, sequences, VOCABULARY)
    return logits_MV.double(), labels_M


@pytest.mark.slow
def test_a_student_s_figures_equal_those_of_dense_logits(
    store: StoreReader, saved_teacher: Path, student: Path
) -> None:
    reports: list[Report] = []
    found = evaluate_student("small", student, store, reports.append)
    teacher_MV, labels_M = logits(saved_teacher, store)
    student_MV, _ = logits(student, store)
    p, q = teacher_MV.softmax(1), student_MV.softmax(1)
    loss = float(dense.cross_entropy(student_MV, labels_M).mean())
    expected = {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "kl": float(dense.forward_kl(teacher_MV, student_MV).mean()),
        "agreement": float((p.argmax(1) == q.argmax(1)).double().mean()),
        "accuracy": float((q.argmax(1) == labels_M).double().mean()),
        "acceptance": float(torch.minimum(p, q).sum(1).mean()),
        "ece": dense.calibration_error(q, labels_M, ECE_BINS),
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4, abs=1e-6), name
    expect_bins(found.calibration, q, labels_M)
    assert 0.1 < found.agreement < 0.9
    assert found.acceptance is not None
    assert 0.1 < found.acceptance < 0.9
    assert found.kl > 0.1
    counted = [report for report in reports if report.unit == "positions"]
    assert counted[0].done == 0
    assert found.positions == len(labels_M) == counted[-1].done == counted[-1].total
    model = load_model(str(student), "model", precision="fp32")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == sum(f.stat().st_size for f in student.glob("*.safetensors"))
    assert found.bits_per_byte == pytest.approx(bits_per_byte(store, loss), rel=1e-5)
    assert [speed.batch for speed in found.generation] == [1, 8]
    for speed in found.generation:
        assert speed.memory_bytes is not None
        assert speed.memory_bytes > 4 * found.parameters  # fp32
    assert found.flops_per_token == flops_per_token(model, LENGTH)
    assert found.dtype == "fp32"
    assert f"torch {torch.__version__}" == found.runtime
    assert found.machine.endswith(f"1 thread, torch {torch.__version__}")


def bits_per_byte(store: StoreReader, loss: float) -> float:
    """Computed from the decoded text of all labels."""
    tokenizer = load_tokenizer(str(store.tokenizer_folder()), "store")
    sequences = store.read(np.arange(len(store))).sequences
    size = 0
    for row in range(len(sequences)):
        for position in sequences.positions[row]:
            token = int(sequences.tokens[row][position + 1])
            size += len(tokenizer.decode([token], skip_special_tokens=True).encode())
    return loss * store.positions / float(np.log(2)) / size


@pytest.mark.slow
def test_the_teacher_s_figures_come_from_the_store(store: StoreReader, saved_teacher: Path) -> None:
    found = evaluate_teacher(store)
    teacher_MV, labels_M = logits(saved_teacher, store)
    p = teacher_MV.softmax(1)
    loss = float(dense.cross_entropy(teacher_MV, labels_M).mean())
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == pytest.approx(float(np.exp(loss)), rel=1e-4)
    accuracy = float((p.argmax(1) == labels_M).double().mean())
    assert found.accuracy == pytest.approx(accuracy)
    assert found.ece == pytest.approx(dense.calibration_error(p, labels_M, ECE_BINS), abs=1e-5)
    expect_bins(found.calibration, p, labels_M)
    assert (found.kl, found.agreement, found.acceptance) == (0.0, 1.0, 1.0)
    assert found.positions == len(labels_M)
    model = load_model(str(saved_teacher), "model", precision="fp32")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == store.manifest.teacher.fingerprint


@pytest.mark.slow
def test_the_teacher_as_a_student_has_the_same_figures(
    store: StoreReader, saved_teacher: Path
) -> None:
    found, own = evaluate_student("itself", saved_teacher, store), evaluate_teacher(store)
    assert abs(found.kl) < 1e-6
    assert found.agreement == 1.0
    assert found.acceptance == pytest.approx(1.0, abs=1e-5)
    figures = ("loss", "accuracy", "ece", "parameters", "bytes", "positions", "bits_per_byte")
    for name in figures:
        assert getattr(found, name) == pytest.approx(getattr(own, name), rel=1e-5), name
    # costs were measured during the capture, on the same machine
    for name in ("flops_per_token", "dtype", "machine", "runtime", "weights"):
        assert getattr(found, name) == getattr(own, name), name
    work = ("batch", "prompt_tokens", "new_tokens")
    assert len(own.generation) == 2
    for one, other in zip(found.generation, own.generation, strict=True):
        assert [getattr(one, name) for name in work] == [getattr(other, name) for name in work]
        assert one.memory_bytes == pytest.approx(other.memory_bytes, rel=0.5, abs=4e6)


@pytest.mark.slow
def test_sampled_targets_give_the_same_figures_on_average(
    corpus: SmallCorpus, store: StoreReader, saved_teacher: Path, student: Path, tmp_path: Path
) -> None:
    exact = evaluate_student("small", student, store)
    capture = Capture(head=2, tail=64, tail_logprobs=True)
    sampled = capture_store(corpus, saved_teacher, tmp_path / "heldout", capture, split="heldout")
    found = evaluate_student("small", student, sampled)
    assert found.kl == pytest.approx(exact.kl, rel=0.03)
    assert found.acceptance == pytest.approx(exact.acceptance, rel=0.003)
    for name in ("loss", "agreement", "accuracy", "ece"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-5), name
    cut = capture_store(
        corpus, saved_teacher, tmp_path / "cut", Capture(head=2, tail=0), split="heldout"
    )
    fewer = evaluate_student("small", student, cut).acceptance
    assert fewer is not None
    assert exact.acceptance is not None
    assert fewer < 0.8 * exact.acceptance


@pytest.mark.slow
def test_a_student_of_another_family_is_evaluated(
    store: StoreReader, tokenizer: Any, tmp_path: Path
) -> None:
    architecture = ArchitectureConfig(family="gpt2", layers=1, hidden=32, heads=2)
    build_model(architecture, tokenizer, LENGTH, 0, "s").save_pretrained(tmp_path / "model")
    student_MV, labels_M = logits(tmp_path / "model", store)
    loss = float(dense.cross_entropy(student_MV, labels_M).mean())
    found = evaluate_student("other", tmp_path / "model", store)
    assert found.loss == pytest.approx(loss, rel=1e-5)


def test_calibration_is_the_sum_over_bins() -> None:
    random = torch.Generator().manual_seed(0)
    probs_MV = (torch.randn(500, 30, generator=random, dtype=torch.float64) * 3).softmax(1)
    probs_MV[:3] = 0.0
    probs_MV[:3, 4] = 1.0  # a confidence of 1 is in the last bin
    labels_M = torch.randint(0, 30, (500,), generator=random)
    calibration = Calibration()
    assert calibration.error() == 0.0
    for rows in (slice(0, 123), slice(123, 500)):
        confidence, top = probs_MV[rows].max(1)
        calibration.add(confidence.numpy(), (top == labels_M[rows]).numpy())
    expected = dense.calibration_error(probs_MV, labels_M, ECE_BINS)
    assert calibration.error() == pytest.approx(expected)
    assert 0.1 < expected < 1.0
    expect_bins(calibration.bins(), probs_MV, labels_M)


def expect_bins(
    bins: Sequence[CalibrationBin], probs_MV: torch.Tensor, labels_M: torch.Tensor
) -> None:
    """Check all bins against dense distributions."""
    confidence_M, top_M = probs_MV.max(1)
    right_M = (top_M == labels_M).double()
    assert len(bins) == ECE_BINS
    assert sum(one.count for one in bins) == len(labels_M)
    for number, one in enumerate(bins):
        inside_M = (confidence_M >= number / ECE_BINS) & (confidence_M < (number + 1) / ECE_BINS)
        if number == ECE_BINS - 1:
            inside_M |= confidence_M >= 1.0
        if one.count == 0:
            assert not inside_M.any()
            assert (one.confidence, one.accuracy) == (None, None)
            continue
        assert one.count == int(inside_M.sum())
        assert one.confidence == pytest.approx(float(confidence_M[inside_M].mean()), abs=1e-5)
        assert one.accuracy == pytest.approx(float(right_M[inside_M].mean()))


@pytest.fixture(scope="module")
def sequences(corpus: SmallCorpus) -> SequenceFile:
    return CorpusLayout(corpus.folder).open("heldout")


def heldout(sequences: SequenceFile, rows: list[int] | None = None, batch: int = 4) -> Heldout:
    return Heldout(sequences, np.arange(len(sequences)) if rows is None else np.array(rows), batch)


def expected(model: Any, sequences: SequenceFile, rows: list[int] | None = None) -> float:
    chosen = np.arange(len(sequences)) if rows is None else np.array(rows)
    with torch.no_grad():
        logits_MV, labels_M = dense.logits_alone(model, sequences.read(chosen), VOCABULARY)
    return float(dense.cross_entropy(logits_MV, labels_M).mean())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_the_held_out_loss_is_the_mean_over_all_supervised_positions(
    name: str, sequences: SequenceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that divide nothing, a vocabulary that is padded, a head that is soft-capped."""
    model = make_model(name, VOCABULARY + 16)
    isolation = choose_isolation(model, VOCABULARY, LENGTH)
    head = connect_head(model, VOCABULARY)
    assert not head.whole
    monkeypatch.setattr(output_head, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    ours = heldout_loss(head, heldout(sequences), isolation)
    assert ours == pytest.approx(expected(model, sequences), rel=1e-5)


def test_a_head_of_unknown_kind_is_measured_by_its_full_logits(sequences: SequenceFile) -> None:
    model = make_model("gemma2", VOCABULARY)
    head = OutputHead(model, VOCABULARY, whole=True)
    ours = heldout_loss(head, heldout(sequences), "positions")
    assert ours == pytest.approx(expected(model, sequences), rel=1e-5)


def test_sequences_weigh_by_their_positions_and_only_the_chosen_count(
    sequences: SequenceFile,
) -> None:
    head = connect_head(make_model("llama", VOCABULARY), VOCABULARY)
    rows = [0, 2, len(sequences) - 1]
    assert len(set(sequences.read(np.array(rows)).positions.lengths)) > 1
    reports: list[Report] = []
    for batch in (1, 2, 5):
        chosen = heldout(sequences, rows, batch)
        ours = heldout_loss(head, chosen, "positions", "stage", reports.append)
        assert ours == pytest.approx(expected(head.model, sequences, rows), rel=1e-5)
        assert (reports[-1].done, reports[-1].total, reports[-1].unit) == (3, 3, "sequences")


def test_a_model_in_training_is_measured_without_dropout_and_stays_in_training(
    sequences: SequenceFile,
) -> None:
    model = make_model("gpt2", VOCABULARY)
    assert model.config.resid_pdrop > 0
    head = connect_head(model, VOCABULARY)
    calm = heldout_loss(head, heldout(sequences), "positions")
    model.train()
    assert heldout_loss(head, heldout(sequences), "positions") == calm
    assert model.training


def test_a_loss_that_is_nan_is_refused(sequences: SequenceFile) -> None:
    model = make_model("llama", VOCABULARY)
    head = connect_head(model, VOCABULARY)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = float("nan")
    with pytest.raises(ColdstillError, match=r"^train: the held-out loss is nan, expected a fin"):
        heldout_loss(head, heldout(sequences), "positions", "train")
