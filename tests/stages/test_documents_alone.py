"""The targets of a document do not depend on other documents in its sequence or batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from bordered import BORDER, BORDERED, VOCABULARY, ScaledByTheBatch, bordered
from coldstill.data.errors import ColdstillError
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.data.schema import Capture
from coldstill.stages.capture.forward import capture_batch
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.evaluation.heldout_loss import label_logprobs
from coldstill.stages.models.borders import borders
from coldstill.stages.models.isolation import packs, recorded
from coldstill.stages.models.isolation_choice import choose_isolation
from coldstill.stages.models.output_head import OutputHead, connect_head
from coldstill.stages.models.rotary import scale_by_document
from dense import documents

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstill.data.schema import Sequences
    from coldstill.stages.report import Report

LENGTH = 48
LENGTHS = [[5, 30, 9], [20, 17, 11], [3], [48], [16, 15], [17, 2, 16], [2, 4], [40, 7]]
"""Documents of each sequence, on both sides of the border and on it."""
CAPTURE = Capture(head=4, tail=0)
EXPECTED = {
    "llama4 queries scaled by place": "single",  # by positions of the sequence, not of the document
    "bloom": "single",  # its attention is biased by positions of the sequence
    "rwkv": "single",
    "mamba": "single",
}
"""Isolation of each model, if it is not by positions."""
ROUNDING = {"mamba": 5e-5}
"""Its sums are long: the same document in two batches differs by as much."""


def sequences_of(lengths: list[list[int]], seed: int = 0) -> Sequences:
    random = np.random.default_rng(seed)
    texts = [[random.integers(0, VOCABULARY, n).astype(np.int32) for n in row] for row in lengths]
    return build_sequences(
        0, [[TokenizedDocument(0, text, text >= 0) for text in row] for row in texts]
    )


@torch.no_grad()
def label_logprobs_alone(make: Callable[[], Any], sequences: Sequences) -> np.ndarray[Any, Any]:
    """Log-probs of every document, by a model that has read nothing else."""
    found = []
    for row, start, end in documents(sequences):
        tokens = torch.from_numpy(sequences.tokens[row][start:end].astype(np.int64))
        logits = make()(input_ids=tokens[None], use_cache=False).logits[0, :-1].double()
        found.append(logits.log_softmax(1).gather(1, tokens[1:, None])[:, 0].numpy())
    return np.concatenate(found)


def captured(teacher: Teacher, sequences: Sequences, batch: int) -> np.ndarray[Any, Any]:
    starts = range(0, len(sequences), batch)
    rows = [np.arange(start, min(start + batch, len(sequences))) for start in starts]
    parts = [capture_batch(teacher, sequences.take(some), CAPTURE) for some in rows]
    return np.concatenate([part.label_logprob for part in parts])


@pytest.mark.parametrize("name", BORDERED)
def test_targets_equal_those_of_the_document_alone(name: str) -> None:
    model = bordered(name)
    head = connect_head(model, VOCABULARY)
    isolation = choose_isolation(model, VOCABULARY, LENGTH)
    assert isolation == EXPECTED.get(name, "positions")
    for seed, lengths in enumerate((LENGTHS, LENGTHS[::-1])):
        given = lengths if packs(isolation) else [[n] for row in lengths for n in row]
        sequences = sequences_of(given, seed)
        alone = label_logprobs_alone(lambda: bordered(name), sequences)
        teacher = Teacher(head=head, isolation=isolation)
        for batch in (len(given), 3, 1):
            found = captured(teacher, sequences, batch)
            assert np.abs(found - alone).max() < ROUNDING.get(name, 1e-5), (lengths, batch)
        # training and evaluation of students use the same inputs
        with torch.no_grad():
            total = label_logprobs(head, sequences, isolation)
        assert total == pytest.approx(float(alone.sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_without_isolation_a_long_document_changes_a_short_one(name: str) -> None:
    sequences = sequences_of([[9], [40]])
    alone = label_logprobs_alone(lambda: bordered(name), sequences)
    head = OutputHead(bordered(name), VOCABULARY)
    found = captured(Teacher(head=head, isolation="single"), sequences, 2)
    assert np.abs(found - alone)[:8].max() > 1e-3


def test_scaling_by_the_longest_text_is_reported_once_with_its_border() -> None:
    reports: list[Report] = []
    for _ in range(2):
        choose_isolation(bordered("llama"), VOCABULARY, LENGTH, report=reports.append)
    assert reports == []
    model = bordered("phi3 longrope")
    choose_isolation(model, VOCABULARY, LENGTH, where="teacher.model", report=reports.append)
    choose_isolation(model, VOCABULARY, BORDER, where="teacher.model", report=reports.append)
    assert [(report.stage, report.note) for report in reports] == [
        (
            "teacher.model",
            "a 'phi3' model scales its positions by the longest text of a batch (longrope, above "
            "16 tokens): each document's are computed from its own length",
        )
    ]


def test_choosing_twice_adds_one_hook() -> None:
    model = bordered("phi3 longrope")
    rotary = next(m for m in model.modules() if hasattr(m, "rope_type"))
    for _ in range(3):
        assert scale_by_document(model) == {"longrope": BORDER}
    assert len(rotary._forward_hooks) == 1
    assert scale_by_document(bordered("llama yarn")) == {}


def test_an_unknown_model_that_depends_on_its_batch_reads_one_document_at_a_time() -> None:
    reports: list[Report] = []
    model = ScaledByTheBatch()
    isolation = choose_isolation(model, VOCABULARY, LENGTH, report=reports.append)
    assert isolation == "alone"
    assert recorded(isolation) == "single"
    assert [report.note for report in reports] == [
        "what a 'llama' model says of a document depends on the others in its batch: one document "
        "a forward pass from here on, which is slower"
    ]
    # no text reaches the border
    assert choose_isolation(model, VOCABULARY, BORDER) == "positions"
    sequences = sequences_of([[9], [40], [16], [17]])
    head = OutputHead(model, VOCABULARY, whole=True)
    alone = label_logprobs_alone(ScaledByTheBatch, sequences)
    found = captured(Teacher(head=head, isolation=isolation), sequences, 4)
    assert np.abs(found - alone).max() < 1e-5
    together = captured(Teacher(head=head, isolation="single"), sequences, 4)
    assert np.abs(together - alone).max() > 1e-3


def test_dependence_on_the_batch_is_detected_in_half_precision() -> None:
    model = ScaledByTheBatch()
    model.inner.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    assert choose_isolation(model, VOCABULARY, LENGTH) == "alone"
    scaled = bordered("phi3 longrope").to(torch.bfloat16)
    assert choose_isolation(scaled, VOCABULARY, LENGTH) == "positions"


def test_a_model_that_sees_the_future_is_refused() -> None:
    class Seeing(ScaledByTheBatch):
        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            output = super().forward(input_ids, **given)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
            return output

    with pytest.raises(ColdstillError, match=r"^teacher\.model: a 'llama' model sees the tokens"):
        choose_isolation(Seeing(), VOCABULARY, LENGTH, where="teacher.model")


def test_a_model_that_remembers_long_texts_is_refused() -> None:
    class Remembering(ScaledByTheBatch):
        longest = 1

        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            self.longest = max(self.longest, input_ids.shape[1])
            own = torch.arange(input_ids.shape[1])[None].expand(input_ids.shape)
            given["position_ids"] = given.get("position_ids", own) * (
                3 if self.longest > BORDER else 1
            )
            return self.inner(input_ids=input_ids, **given)

    with pytest.raises(ColdstillError, match="depends on the texts that it was asked about before"):
        choose_isolation(Remembering(), VOCABULARY, LENGTH)


def test_every_length_that_a_configuration_names_is_a_border() -> None:
    assert borders(bordered("llama").config, LENGTH) == []
    for name in ("phi3 longrope", "llama dynamic", "llama yarn", "gemma3 window", "llama4 chunks"):
        assert BORDER in borders(bordered(name).config, LENGTH), name
        assert borders(bordered(name).config, BORDER) == []
    config = bordered("gemma3 longrope in half the layers").config
    config.rope_parameters["full_attention"]["original_max_position_embeddings"] = 23
    assert borders(config, LENGTH) == [BORDER, 23]
