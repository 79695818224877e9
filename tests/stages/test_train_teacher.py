"""A new teacher learns the corpus by cross-entropy."""

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
from coldstill.stages.evaluation.quality import Heldout
from coldstill.stages.models.building import build_model
from coldstill.stages.models.loading import load_model, load_tokenizer
from coldstill.stages.train_teacher import train_teacher
from coldstill.stages.training.feed import CorpusDataset
from coldstill.stages.training.metrics import read_metrics
from conftest import VOCABULARY
from small_runs import LENGTH, SmallCorpus, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Sequences

ARCHITECTURE = ArchitectureConfig(layers=1, hidden=32, heads=2)


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


def run(folder: Path, corpus: SmallCorpus, tokenizer: Any, **changes: Any) -> None:
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


def test_a_new_teacher_learns_the_corpus_and_is_saved_with_its_tokenizer(
    corpus: SmallCorpus, tokenizer: Any, tmp_path: Path
) -> None:
    layout, notes = CorpusLayout(corpus.folder), list[str]()
    train, held_out = layout.open("train"), layout.open("heldout")
    rows = np.arange(len(held_out))
    run(
        tmp_path,
        corpus,
        tokenizer,
        heldout=Heldout(held_out, rows, 3),
        report=lambda report: notes.append(report.note),
    )
    lines = read_metrics(tmp_path)
    first = train.read(CorpusDataset(train).order(2, 0)[:4])
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
        run(tmp_path / "out", corpus, tokenizer)
    assert not (tmp_path / "out").exists()
