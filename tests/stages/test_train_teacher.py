"""A new teacher learns the corpus; a corrected one keeps its form and reports both losses."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages import train_teacher as module
from coldstill.stages.config import ArchitectureConfig, LoraConfig, TrainConfig
from coldstill.stages.evaluation.quality import Heldout, heldout_loss
from coldstill.stages.models.building import build_model
from coldstill.stages.models.loading import load_model, load_tokenizer, teacher_identity
from coldstill.stages.report import Report, Reporter, silent
from coldstill.stages.train_teacher import Correction, correct_teacher, train_teacher
from coldstill.stages.training import chunked_loss
from coldstill.stages.training.feed import CorpusDataset
from conftest import VOCABULARY, make_model
from safetensors.torch import load_file
from small_runs import LENGTH, SmallCorpus
from small_students import KilledError, killed_at
from small_trainings import read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.schema import Sequences

    Weights = dict[str, torch.Tensor]
    Correct = Callable[..., Weights]


ARCHITECTURE = ArchitectureConfig(layers=1, hidden=32, heads=2)


def train(folder: Path, corpus: SmallCorpus, tokenizer: Any, **changes: Any) -> None:
    train_teacher(
        folder,
        ARCHITECTURE,
        TrainConfig(steps=60, batch_tokens=4 * LENGTH, log_every=1, learning_rate=1e-2),
        tokenizer,
        CorpusLayout(corpus.folder).open("train"),
        sequence_length=LENGTH,
        together=True,
        seed=2,
        **changes,
    )


def loss_of(model: Any, sequences: Sequences) -> float:
    with torch.no_grad():
        logits_MV, labels_M = dense.logits_alone(model, sequences, VOCABULARY)
    return float(dense.cross_entropy(logits_MV, labels_M).mean())


@pytest.mark.slow
def test_a_new_teacher_learns_the_corpus_and_is_saved_with_its_tokenizer(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    layout, notes = CorpusLayout(corpus.folder), list[str]()
    taught, held_out = layout.open("train"), layout.open("heldout")
    rows = np.arange(len(held_out))
    train(
        tmp_path,
        corpus,
        tokenizer,
        heldout=Heldout(held_out, rows, 3),
        report=lambda report: notes.append(report.note),
    )
    lines = read_metrics(tmp_path)
    first = taught.read(CorpusDataset(taught).order(2, 0)[:4])
    expected = loss_of(build_model(ARCHITECTURE, tokenizer, LENGTH, 2, "teacher"), first)
    assert lines[0]["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert lines[0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert not {"kl", "agreement", "teacher_mass", "student_mass"} & lines[0].keys()
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    assert np.isfinite([line["grad_norm"] for line in lines]).all()
    model = load_model(str(tmp_path / "model"), "teacher", precision="fp32")
    assert model.config.num_hidden_layers == 1
    assert model.config.use_cache is True  # the trainer turns it off while it trains
    names = load_tokenizer(str(tmp_path / "model"), "teacher").get_vocab()
    assert names == tokenizer.get_vocab()
    loss = loss_of(model, held_out.read(rows))
    assert [note for note in notes if note][-1] == f"held-out loss {loss:.3f}"


def test_an_architecture_that_cannot_isolate_packed_documents_is_refused(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "choose_isolation", lambda *_, **__: "single")
    with pytest.raises(ColdstillError, match=r"^teacher\.architecture: a 'llama' model cannot"):
        train(tmp_path / "out", corpus, tokenizer)
    assert not (tmp_path / "out").exists()


LORA = LoraConfig(rank=8, dropout=0.1)
CHECKPOINTS: dict[str, Any] = {"steps": 12, "checkpoint_every": 4}


def save_base(folder: Path, name: str = "llama-tied", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Save a model with padded rows and weights that bf16 can represent."""
    make_model(name, VOCABULARY + 16, seed=1).to(torch.bfloat16).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def correct(corpus: SmallCorpus, tokenizer: Any) -> Callable[..., Weights]:
    """Corrects a base model in a folder; returns the saved weights."""
    layout = CorpusLayout(corpus.folder)
    heldout = layout.open("heldout")

    def run(
        folder: Path,
        base: Path,
        report: Reporter = silent,
        lora: LoraConfig | None = None,
        rows: int | None = None,
        **settings: Any,
    ) -> Weights:
        defaults: dict[str, Any] = {"steps": 12, "batch_tokens": 4 * LENGTH, "log_every": 1}
        defaults["learning_rate"] = 3e-3 if lora is None else 2e-2
        job = Correction(
            model=load_model(str(base), "teacher.model", precision="auto"),
            tokenizer=tokenizer,
            isolation="positions",
            lora=lora,
            config=TrainConfig(**(defaults | settings)),
            sequences=layout.open("train"),
            heldout=Heldout(heldout, np.arange(rows or len(heldout)), 4),
            sequence_length=LENGTH,
            seed=2,
            folder=folder,
            record=folder / "correction.json",
        )
        correct_teacher(job, report)
        return weights_of(folder / "model")

    return run


def weights_of(folder: Path) -> Weights:
    weights: Weights = load_file(folder / "model.safetensors")
    return weights


def heldout_loss_of(folder: Path, corpus: SmallCorpus) -> float:
    file = CorpusLayout(corpus.folder).open("heldout")
    model = load_model(str(folder), "test", precision="auto")
    return loss_of(model, file.read(np.arange(len(file))))


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "correction.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Corrected:
    """One finished correction."""

    folder: Path
    lora: LoraConfig | None
    weights: Weights
    last: Report


@pytest.fixture(scope="module", params=[None, LORA], ids=["full", "lora"])
def corrected(
    request: pytest.FixtureRequest,
    base: Path,
    correct: Correct,
    tmp_path_factory: pytest.TempPathFactory,
) -> Corrected:
    folder, reports = tmp_path_factory.mktemp("corrected"), list[Report]()
    lora: LoraConfig | None = request.param
    weights = correct(folder, base, reports.append, lora, **CHECKPOINTS)
    return Corrected(folder, lora, weights, reports[-1])


@pytest.mark.slow
def test_the_loss_falls_and_both_losses_are_those_of_checkpoints(
    corrected: Corrected, base: Path, corpus: SmallCorpus
) -> None:
    found = figures(corrected.folder)
    # bf16 rounds differently in batches of packed documents
    assert found["before"] == pytest.approx(heldout_loss_of(base, corpus), rel=2e-3)
    assert found["after"] == pytest.approx(
        heldout_loss_of(corrected.folder / "model", corpus), rel=2e-3
    )
    assert found["after"] < found["before"] - 0.3
    assert corrected.last.note == (
        f"held-out loss {found['before']:.3f} before, {found['after']:.3f} after"
    )
    assert not corrected.last.warning
    assert found["method"] == ("full" if corrected.lora is None else "lora")


@pytest.mark.slow
def test_adapters_leave_embeddings_and_norms_and_only_they_are_in_checkpoints(
    corrected: Corrected, base: Path
) -> None:
    if corrected.lora is None:
        return
    old = weights_of(base)
    changed = {k.split(".")[-2] for k in old if not torch.equal(corrected.weights[k], old[k])}
    assert changed <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "up_proj" in changed
    saved = weights_of(corrected.folder / "checkpoints" / "checkpoint-12")
    assert saved
    assert all("lora_" in key for key in saved)
    assert figures(corrected.folder)["trained"] == sum(weight.numel() for weight in saved.values())


@pytest.mark.slow
def test_a_killed_correction_resumes_exactly(
    corrected: Corrected,
    base: Path,
    correct: Correct,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is killed before the first checkpoint and after one; the base is measured once."""
    measured: list[float] = []

    def counted(*arguments: Any) -> float:
        measured.append(heldout_loss(*arguments))
        return measured[-1]

    monkeypatch.setattr(module, "heldout_loss", counted)

    def run(report: Reporter) -> Weights:
        return correct(tmp_path, base, report, corrected.lora, **CHECKPOINTS)

    for step in (2, 9):
        with pytest.raises(KilledError):
            run(killed_at(step, "train-teacher"))
        assert not (tmp_path / "model").exists()
        assert set(figures(tmp_path)) == {"before", "sequences", "method"}
        assert figures(tmp_path)["before"] == measured[0]
    notes: list[str] = []
    again = run(lambda report: notes.append(report.note))
    assert "resuming from step 8" in notes
    for key, weight in corrected.weights.items():
        assert torch.equal(weight, again[key]), key
    assert len(measured) == 2
    assert figures(tmp_path) == figures(corrected.folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora", "learned"),
    [
        ("llama", None, ""),
        ("llama-tied", None, ""),
        ("gpt2", LORA, "c_"),
        ("llama", LoraConfig(rank=2, dropout=0.1, targets=("v_proj",)), "v_proj"),
    ],
)
def test_the_result_is_a_checkpoint_like_the_base(
    name: str,
    lora: LoraConfig | None,
    learned: str,
    correct: Correct,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only chosen layers change, and the gradient of a frozen head is never computed."""
    wanted: list[tuple[bool, ...]] = []
    real = chunked_loss._Gradients.__init__

    def watched(self: Any, *arguments: Any) -> None:
        wanted.append(tuple(arguments[-1][:3]))
        real(self, *arguments)

    monkeypatch.setattr(chunked_loss._Gradients, "__init__", watched)
    base, made = save_base(tmp_path / "base", name), tmp_path / "out" / "model"
    weights = correct(made.parent, base, lora=lora, steps=2, rows=3)
    assert set(wanted) == {(True, lora is None, False)}
    old = weights_of(base)
    forms = [{k: (w.shape, w.dtype) for k, w in table.items()} for table in (weights, old)]
    assert forms[0] == forms[1]
    changed = {key for key in old if not torch.equal(weights[key], old[key])}
    assert changed
    assert all(learned in key for key in changed)
    if learned == "v_proj":
        assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}
    configs = [(at / "config.json").read_text(encoding="utf-8") for at in (base, made)]
    assert json.loads(configs[0]) == json.loads(configs[1])
    assert not {path.name for path in made.iterdir() if "adapter" in path.name}
    assert load_tokenizer(str(made), "test").get_vocab() == tokenizer.get_vocab()
    model = load_model(str(made), "test", precision="auto")
    assert model.dtype == torch.bfloat16
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight.shape[0] == VOCABULARY + 16


@pytest.mark.slow
def test_bf16_weights_are_trained_in_fp32_and_rounded_once(
    correct: Correct, tmp_path: Path
) -> None:
    """In bf16 every update of a thousandth of a weight would be rounded away."""
    settings: dict[str, Any] = {"steps": 10, "learning_rate": 2e-4, "schedule": "constant"}
    half = save_base(tmp_path / "half", dtype=torch.bfloat16)
    full = save_base(tmp_path / "full", dtype=torch.float32)
    ours = correct(tmp_path / "ours", half, **settings)
    exact = correct(tmp_path / "exact", full, **settings)
    assert {weight.dtype for weight in exact.values()} == {torch.float32}
    for key, weight in exact.items():
        assert torch.equal(ours[key], weight.to(torch.bfloat16)), key


@pytest.mark.slow
def test_other_heldout_sequences_are_measured_again(
    base: Path, correct: Correct, tmp_path: Path
) -> None:
    losses = []
    for rows in (None, 3):
        with pytest.raises(KilledError):
            correct(tmp_path, base, killed_at(1, "train-teacher"), rows=rows)
        losses.append(figures(tmp_path)["before"])
    assert losses[0] != losses[1]
    assert figures(tmp_path)["sequences"] == 3


@pytest.mark.slow
def test_an_increased_loss_is_a_warning(base: Path, correct: Correct, tmp_path: Path) -> None:
    reports: list[Report] = []
    correct(tmp_path, base, reports.append, steps=2, learning_rate=3.0, rows=3)
    found = figures(tmp_path)
    assert found["after"] > found["before"]
    assert reports[-1].warning
    assert reports[-1].note.endswith(
        "after: the loss increased; remove teacher.train, or lower its learning_rate or steps"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"lora": LoraConfig(targets=("q_prj",))}, r"^teacher\.lora\.targets: no linear layer"),
        (
            {"trainer": {"optimm": "sgd"}},
            r"^train-teacher: train\.trainer: transformers has no training argument 'optimm'",
        ),
        ({"batch_tokens": 5 * LENGTH, "micro_batch_tokens": 2 * LENGTH}, r"cannot be shared out"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    changes: dict[str, Any], line: str, base: Path, correct: Correct, tmp_path: Path
) -> None:
    with pytest.raises(ColdstillError, match=line):
        correct(tmp_path / "out", base, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions_are_kept(dtype: torch.dtype, correct: Correct, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    # the computation may use another precision than the weights
    settings: dict[str, Any] = {"lora": LORA, "precision": "bf16", "steps": 6, "rows": 3}
    weights = correct(tmp_path / "out", base, **settings)
    assert {weight.dtype for weight in weights.values()} == {dtype}
    found = figures(tmp_path / "out")
    assert found["after"] < found["before"] - 0.1
    identities = [
        teacher_identity(str(at), "test", dtype="auto", revision="main")
        for at in (base, tmp_path / "out" / "model")
    ]
    assert identities[0].dtype == identities[1].dtype
    assert identities[0].fingerprint != identities[1].fingerprint
