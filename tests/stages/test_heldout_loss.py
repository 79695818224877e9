"""The loss on held-out documents, against whole logits of each document run by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dense
import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import CorpusLayout
from coldstill.stages.evaluation.quality import Heldout, heldout_loss
from coldstill.stages.models import output_head
from coldstill.stages.models.isolation import choose_isolation
from coldstill.stages.models.output_head import OutputHead, connect_head
from conftest import VOCABULARY, make_model
from small_runs import LENGTH, SmallCorpus, prepare

if TYPE_CHECKING:
    from coldstill.data.prepared import SequenceFile
    from coldstill.stages.report import Report


@pytest.fixture(scope="module")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


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
def test_it_is_the_mean_over_all_supervised_positions(
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
    said: list[Report] = []
    for batch in (1, 2, 5):
        chosen = heldout(sequences, rows, batch)
        ours = heldout_loss(head, chosen, "positions", "stage", said.append)
        assert ours == pytest.approx(expected(head.model, sequences, rows), rel=1e-5)
        assert (said[-1].done, said[-1].total, said[-1].unit) == (3, 3, "sequences")


def test_a_model_in_training_is_asked_without_dropout_and_goes_on_training(
    sequences: SequenceFile,
) -> None:
    model = make_model("gpt2", VOCABULARY)
    assert model.config.resid_pdrop > 0
    head = connect_head(model, VOCABULARY)
    calm = heldout_loss(head, heldout(sequences), "positions")
    model.train()
    assert heldout_loss(head, heldout(sequences), "positions") == calm
    assert model.training


def test_a_loss_that_is_no_number_is_refused(sequences: SequenceFile) -> None:
    model = make_model("llama", VOCABULARY)
    head = connect_head(model, VOCABULARY)
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = float("nan")
    with pytest.raises(ColdstillError, match=r"^train: the held-out loss is nan, expected a fin"):
        heldout_loss(head, heldout(sequences), "positions", "train")
