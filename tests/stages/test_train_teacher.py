"""A teacher made here learns the text itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages import train_teacher as module
from coldstill.stages.config import ArchitectureConfig, TrainConfig
from coldstill.stages.evaluation.heldout_loss import Heldout
from coldstill.stages.models.building import build_model
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.train_teacher import train_teacher
from coldstill.stages.training.feed import CorpusDataset
from coldstill.stages.training.loop import read_metrics
from conftest import VOCABULARY
from small_runs import LENGTH, SmallCorpus, prepare

if TYPE_CHECKING:
    from pathlib import Path

ARCHITECTURE = ArchitectureConfig(layers=1, hidden=32, heads=2)


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


def run(folder: Path, corpus: SmallCorpus, tokenizer: Any, **settings: Any) -> None:
    defaults: dict[str, Any] = {"steps": 1, "batch_tokens": 4 * LENGTH, "log_every": 1}
    train_teacher(
        folder,
        ARCHITECTURE,
        TrainConfig(**(defaults | settings)),
        tokenizer,
        CorpusLayout(corpus.folder).open("train"),
        sequence_length=LENGTH,
        together=True,
        seed=2,
    )


def test_the_first_loss_is_the_models_own_cross_entropy_of_each_document(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    run(tmp_path, corpus, tokenizer)
    model = build_model(ARCHITECTURE, tokenizer, LENGTH, 2, "teacher")
    file = CorpusLayout(corpus.folder).open("train")
    sequences = file.read(CorpusDataset(file).order(2, 0)[:4])
    with torch.no_grad():
        logits_MV, labels_M = dense.logits_alone(model, sequences, VOCABULARY)
    expected = float(dense.cross_entropy(logits_MV, labels_M).mean())
    line = read_metrics(tmp_path)[0]
    assert line["cross_entropy"] == pytest.approx(expected, rel=1e-5)
    assert line["loss"] == pytest.approx(expected, rel=1e-4)
    assert not {"kl", "agreement", "teacher_mass", "student_mass"} & line.keys()


def test_a_trained_teacher_is_a_model_with_its_tokenizer(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    run(tmp_path, corpus, tokenizer, steps=60, learning_rate=1e-2)
    lines = read_metrics(tmp_path)
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["accuracy"] > lines[0]["accuracy"]
    model = load_model(str(tmp_path / "model"), "teacher", precision="fp32")
    assert model.config.num_hidden_layers == 1
    assert model.config.use_cache is True  # the trainer's own setting stays with it
    names = load_tokenizer(str(tmp_path / "model"), "teacher").get_vocab()
    assert names == tokenizer.get_vocab()
    assert np.isfinite([line["grad_norm"] for line in lines]).all()


def test_an_architecture_that_leaks_is_refused_packed_documents(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "choose_isolation", lambda *_, **__: "single")
    with pytest.raises(ColdstillError, match=r"^teacher\.architecture: a 'llama' model cannot"):
        run(tmp_path / "out", corpus, tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_new_teacher_is_measured_on_held_out_documents(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    layout = CorpusLayout(corpus.folder)
    file = layout.open("heldout")
    notes: list[str] = []
    train_teacher(
        tmp_path,
        ARCHITECTURE,
        TrainConfig(steps=3, batch_tokens=4 * LENGTH),
        tokenizer,
        layout.open("train"),
        sequence_length=LENGTH,
        together=True,
        seed=2,
        heldout=Heldout(file, np.arange(len(file)), 3),
        report=lambda report: notes.append(report.note),
    )
    model = load_model(str(tmp_path / "model"), "teacher", precision="fp32")
    with torch.no_grad():
        logits_MV, labels_M = dense.logits_alone(model, file.read(np.arange(len(file))), VOCABULARY)
    expected = float(dense.cross_entropy(logits_MV, labels_M).mean())
    assert [note for note in notes if note][-1] == f"held-out loss {expected:.3f}"
