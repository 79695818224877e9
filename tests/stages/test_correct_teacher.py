"""A model that exists learns the corpus, stays what it is otherwise, and says what it won."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages import correct_teacher as module
from coldstill.stages.config import LoraConfig, TrainConfig
from coldstill.stages.correct_teacher import Correction, correct_teacher
from coldstill.stages.evaluation.heldout_loss import Heldout, heldout_loss
from coldstill.stages.models.identity import teacher_identity
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.report import Report, Reporter, silent
from conftest import VOCABULARY, make_model
from safetensors.torch import load_file
from small_runs import LENGTH, SmallCorpus, prepare

if TYPE_CHECKING:
    from pathlib import Path

LORA = LoraConfig(rank=8)
both = pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])


class KilledError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


def save_base(folder: Path, name: str = "llama-tied", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model with rows past the vocabulary, in half precision."""
    make_model(name, VOCABULARY + 16, seed=1).to(torch.bfloat16).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model")


def correct(
    folder: Path,
    base: Path,
    corpus: SmallCorpus,
    tokenizer: Any,
    report: Reporter = silent,
    lora: LoraConfig | None = None,
    rows: int | None = None,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Correct the base; the weights that were saved."""
    layout = CorpusLayout(corpus.folder)
    heldout = layout.open("heldout")
    defaults: dict[str, Any] = {"steps": 12, "batch_tokens": 4 * LENGTH, "log_every": 1}
    rate = 3e-3 if lora is None else 2e-2
    job = Correction(
        model=load_model(str(base), "teacher.model", precision="auto"),
        tokenizer=tokenizer,
        isolation="positions",
        lora=lora,
        config=TrainConfig(**(defaults | {"learning_rate": rate} | settings)),
        sequences=layout.open("train"),
        heldout=Heldout(heldout, np.arange(rows or len(heldout)), 4),
        sequence_length=LENGTH,
        seed=2,
        folder=folder,
        record=folder / "correction.json",
    )
    correct_teacher(job, report)
    weights: dict[str, torch.Tensor] = load_file(folder / "model" / "model.safetensors")
    return weights


def figures(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "correction.json").read_text(encoding="utf-8"))
    return found


def loss_of(folder: Path, corpus: SmallCorpus) -> float:
    """The obvious way: the saved model, whole logits, each document by itself."""
    model = load_model(str(folder), "test", precision="auto")
    file = CorpusLayout(corpus.folder).open("heldout")
    with torch.no_grad():
        logits_MV, labels_M = dense.logits_alone(model, file.read(np.arange(len(file))), VOCABULARY)
    return float(dense.cross_entropy(logits_MV, labels_M).mean())


@both
def test_the_loss_falls_and_both_figures_are_those_of_checkpoints(
    lora: LoraConfig | None, base: Path, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    said: list[Report] = []
    correct(tmp_path, base, corpus, tokenizer, said.append, lora)
    found = figures(tmp_path)
    # bf16 rounds differently in batches of packed documents
    assert found["before"] == pytest.approx(loss_of(base, corpus), rel=2e-3)
    assert found["after"] == pytest.approx(loss_of(tmp_path / "model", corpus), rel=2e-3)
    assert found["after"] < found["before"] - 0.3
    last = said[-1]
    assert last.note == (f"held-out loss {found['before']:.3f} before, {found['after']:.3f} after")
    assert not last.warning
    assert found["method"] == ("full" if lora is None else "lora")


@both
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_what_comes_out_is_a_checkpoint_like_the_one_that_went_in(
    name: str, lora: LoraConfig | None, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", name)
    weights = correct(tmp_path / "out", base, corpus, tokenizer, lora=lora, steps=2)
    old = load_file(base / "model.safetensors")
    assert {key: (w.shape, w.dtype) for key, w in weights.items()} == {
        key: (w.shape, w.dtype) for key, w in old.items()
    }
    assert any(not torch.equal(weights[key], old[key]) for key in old)
    configs = [
        json.loads((at / "config.json").read_text(encoding="utf-8"))
        for at in (base, tmp_path / "out" / "model")
    ]
    assert configs[0] == configs[1]
    kept = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert not {name for name in kept if "adapter" in name}
    names = load_tokenizer(str(tmp_path / "out" / "model"), "test").get_vocab()
    assert names == tokenizer.get_vocab()
    model = load_model(str(tmp_path / "out" / "model"), "test", precision="auto")
    assert model.dtype == torch.bfloat16
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight.shape[0] == VOCABULARY + 16


def test_adapters_leave_embeddings_and_norms_and_checkpoints_hold_them_alone(
    base: Path, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    weights = correct(tmp_path, base, corpus, tokenizer, lora=LORA, steps=2, checkpoint_every=2)
    old = load_file(base / "model.safetensors")
    changed = {key.split(".")[-2] for key in old if not torch.equal(weights[key], old[key])}
    assert changed <= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert "up_proj" in changed
    saved = load_file(tmp_path / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert saved
    assert all("lora_" in key for key in saved)
    assert figures(tmp_path)["trained"] == sum(weight.numel() for weight in saved.values())


def test_only_the_chosen_layers_learn(
    base: Path, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    lora = LoraConfig(rank=2, dropout=0.1, targets=("v_proj",))
    weights = correct(tmp_path, base, corpus, tokenizer, lora=lora, steps=2)
    old = load_file(base / "model.safetensors")
    changed = {key for key in old if not torch.equal(weights[key], old[key])}
    assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}


def test_half_precision_weights_are_trained_in_full_and_rounded_once(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    """Steps of a thousandth of a weight: in bf16 every single one would be rounded away."""
    settings: dict[str, Any] = {"steps": 10, "learning_rate": 2e-4, "schedule": "constant"}
    half = save_base(tmp_path / "half", dtype=torch.bfloat16)
    full = save_base(tmp_path / "full", dtype=torch.float32)
    ours = correct(tmp_path / "ours", half, corpus, tokenizer, **settings)
    exact = correct(tmp_path / "exact", full, corpus, tokenizer, **settings)
    assert {weight.dtype for weight in exact.values()} == {torch.float32}
    for key, weight in exact.items():
        assert torch.equal(ours[key], weight.to(torch.bfloat16)), key


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, dropout=0.2)], ids=["full", "lora"])
@pytest.mark.parametrize("killed_at", [2, 9])
def test_a_correction_that_was_killed_goes_on_as_if_nothing_had_happened(
    killed_at: int,
    lora: LoraConfig | None,
    base: Path,
    corpus: SmallCorpus,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first checkpoint and after one; the base is measured once."""
    settings: dict[str, Any] = {"lora": lora, "steps": 12, "checkpoint_every": 4}
    straight = correct(tmp_path / "straight", base, corpus, tokenizer, **settings)
    measured: list[float] = []

    def counted(*arguments: Any) -> float:
        measured.append(heldout_loss(*arguments))
        return measured[-1]

    monkeypatch.setattr(module, "heldout_loss", counted)

    def killed(report: Report) -> None:
        if report.total and report.unit == "tokens" and report.done == killed_at * 4 * LENGTH:
            raise KilledError

    with pytest.raises(KilledError):
        correct(tmp_path / "killed", base, corpus, tokenizer, killed, **settings)
    assert not (tmp_path / "killed" / "model").exists()
    first = figures(tmp_path / "killed")
    assert set(first) == {"before", "sequences", "method"}
    notes: list[str] = []
    again = correct(
        tmp_path / "killed",
        base,
        corpus,
        tokenizer,
        lambda report: notes.append(report.note),
        **settings,
    )
    assert ("going on from step 8" in notes) == (killed_at == 9)
    for key, weight in straight.items():
        assert torch.equal(weight, again[key]), key
    assert len(measured) == 2
    assert figures(tmp_path / "killed") == figures(tmp_path / "straight")
    assert first["before"] == measured[0]


def test_another_choice_of_heldout_sequences_is_measured_anew(
    base: Path, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    def killed(report: Report) -> None:
        if report.total and report.unit == "tokens":
            raise KilledError

    with pytest.raises(KilledError):
        correct(tmp_path, base, corpus, tokenizer, killed, steps=2)
    before = figures(tmp_path)["before"]
    correct(tmp_path, base, corpus, tokenizer, steps=2, rows=3)
    found = figures(tmp_path)
    assert found["sequences"] == 3
    assert found["before"] != before


def test_a_teacher_that_got_worse_is_warned_about(
    base: Path, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    said: list[Report] = []
    correct(tmp_path, base, corpus, tokenizer, said.append, steps=3, learning_rate=3.0)
    found = figures(tmp_path)
    assert found["after"] > found["before"]
    assert said[-1].warning
    assert said[-1].note.endswith(
        "after: worse than it was; remove teacher.train, or lower its learning_rate or steps"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora": LoraConfig(targets=("q_prj",))}, r"^teacher\.lora\.targets: no linear layer"),
        (
            {"trainer": {"optimm": "sgd"}},
            r"^train-teacher: train\.trainer: transformers has no training argument 'optimm'",
        ),
        ({"batch_tokens": 5 * LENGTH, "micro_batch_tokens": 2 * LENGTH}, r"cannot be shared out"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    changes: dict[str, Any],
    said: str,
    base: Path,
    corpus: SmallCorpus,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(ColdstillError, match=said):
        correct(tmp_path / "out", base, corpus, tokenizer, **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_precisions_come_back_too(
    dtype: torch.dtype, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", dtype=dtype)
    # what computes may have another precision than what is kept
    weights = correct(tmp_path / "out", base, corpus, tokenizer, lora=LORA, precision="bf16")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    found = figures(tmp_path / "out")
    assert found["after"] < found["before"] - 0.3
    identities = [
        teacher_identity(str(at), "test", dtype="auto", revision="main")
        for at in (base, tmp_path / "out" / "model")
    ]
    assert identities[0].dtype == identities[1].dtype
    assert identities[0].fingerprint != identities[1].fingerprint


def test_the_gradient_of_a_frozen_head_is_never_made(
    base: Path, corpus: SmallCorpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be as large as the head, at every step."""
    from coldstill.stages.training import chunked_loss

    wanted: list[tuple[bool, ...]] = []
    real = chunked_loss._Gradients.__init__

    def watched(self: Any, *arguments: Any) -> None:
        wanted.append(tuple(arguments[-1][:3]))
        real(self, *arguments)

    monkeypatch.setattr(chunked_loss._Gradients, "__init__", watched)
    correct(tmp_path / "lora", base, corpus, tokenizer, lora=LORA, steps=1)
    correct(tmp_path / "full", base, corpus, tokenizer, steps=1)
    assert wanted == [(True, False, False), (True, True, False)]
