"""Records inside chunks of a store in a student's tokens, against slow loops over all tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.retokenize import Decisions, retokenize
from coldstill.data.maintenance.verify import verify
from coldstill.data.retokenized.beginnings import Beginnings
from coldstill.data.retokenized.continued import PRIOR_DRAWS, Continuations, Inside
from coldstill.data.schema import Block, Capture
from oracles import everything
from retokenizing import TEXTS, loaded, matched
from spellings import END, packed, random_records, records_of, text_store

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

pytest_plugins = ("retokenized_stores",)
CAPTURES = {
    "whole": Capture(head=0, tail=0),
    "samples": Capture(head=0, tail=20),
    "both": Capture(head=5, tail=6),
    "head": Capture(head=6, tail=0),
}


def pieces_of(teacher: Any, student: Any) -> list[list[int]]:
    """The student's tokens of each token of the teacher, by its own model."""
    found: list[list[int]] = [[]] * teacher.get_vocab_size()
    for token, index in teacher.get_vocab().items():
        if token == END:
            found[index] = [student.token_to_id(END)]
        else:
            found[index] = [piece.id for piece in student.model.tokenize(token)]
    return found


def believed(block: Block, capture: Capture, size: int) -> NDArray[np.float64]:
    """[M, V] what each record says of every token, the mean over all records beside its samples."""
    targets, count = block.targets, len(block.targets)
    head_MV, drawn_MV = np.zeros((count, size)), np.zeros((count, size))
    for row in range(count):
        head_MV[row, targets.head_ids[row]] = np.exp(targets.head_logprobs[row].astype(np.float64))
    np.add.at(drawn_MV, (targets.tail.rows(), targets.tail.ids), targets.tail.counts)
    rest_M = np.exp(targets.log_tail.astype(np.float64))
    said = head_MV + drawn_MV * (rest_M / max(1, capture.tail))[:, None]
    mean_V = said.sum(0) / said.sum()
    for row in range(count):
        outside = np.ones(size, np.bool_)
        outside[targets.head_ids[row]] = False
        prior_V = mean_V * outside / (1.0 - mean_V[~outside].sum())
        both_V = drawn_MV[row] + PRIOR_DRAWS * prior_V
        head_MV[row] += rest_M[row] * both_V / (capture.tail + PRIOR_DRAWS)
    return head_MV


@pytest.mark.parametrize("name", ["removed", "bytes", "added"])
@pytest.mark.parametrize("kind", CAPTURES)
def test_a_record_inside_a_chunk_says_how_the_teachers_tokens_go_on(
    folder: Path, tmp_path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: list[NDArray[np.float64]] = []
    entries_of = Continuations.entries

    def recorded(self: Continuations, records: Any, draws: int, inside: Any) -> Any:
        """The distributions before any of their tokens is drawn."""
        entries, entropy_I = entries_of(self, records, draws, inside)
        found = np.zeros((len(entropy_I), loaded(folder / name).get_vocab_size()))
        found[entries.rows_E, entries.ids_E] = entries.masses_E
        exact.extend(found)
        return entries, entropy_I

    monkeypatch.setattr(Continuations, "entries", recorded)
    teacher, student = loaded(folder / "teacher"), loaded(folder / name)
    size = teacher.get_vocab_size()
    capture = Capture(head=size, tail=0) if kind == "whole" else CAPTURES[kind]
    sequences = packed(teacher, TEXTS * 3)
    targets, p_MV = random_records(0, labels(sequences), capture, size)
    block = Block(sequences=sequences, targets=targets, capture=capture)
    text_store(tmp_path / "old", folder / "teacher", block, block.capture)
    block = everything(tmp_path / "old")  # what the codec keeps
    retokenize(
        str(tmp_path / "old"), str(tmp_path / "new"), folder / name, Decisions(ambiguous="map")
    )
    assert not list(verify(str(tmp_path / "new")))
    new = everything(tmp_path / "new")
    belief_MV = p_MV if kind == "whole" else believed(block, capture, size)
    pieces, theirs_M, ours_M = (
        pieces_of(teacher, student), labels(block.sequences), labels(new.sequences)
    )  # fmt: skip
    label_M = np.exp(block.targets.label_logprob.astype(np.float64))
    places = {ours: theirs for theirs, ours in matched(block, new, teacher, student)}
    wanted, said, seen = [], [], 0
    begin = -1
    for row, chunk in enumerate(new.targets.chunk_sizes[:, 0].tolist()):
        begin = row if chunk else begin
        if chunk or new.targets.chunk_sizes[begin, 0] < 0:
            continue
        seen += 1
        own, before = places[begin], ours_M[begin:row].tolist()
        next_V = np.zeros(student.get_vocab_size())
        spelled = False
        for token, spelling in enumerate(pieces):
            if spelling[: len(before)] == before and len(spelling) > len(before):
                is_label = token == theirs_M[own]
                spelled |= bool(is_label)
                share = label_M[own] if is_label else belief_MV[own, token]
                next_V[spelling[len(before)]] += share
        if not spelled:
            next_V[ours_M[row]] += np.exp(float(new.targets.label_logprob[begin]))
        wanted.append(next_V / next_V.sum())
        found = np.zeros_like(next_V)
        found[new.targets.head_ids[row]] = np.exp(new.targets.head_logprobs[row])
        if new.capture.tail:
            part = slice(*new.targets.tail.offsets[row : row + 2])
            each = np.exp(float(new.targets.log_tail[row])) / new.capture.tail
            found[new.targets.tail.ids[part]] += each * new.targets.tail.counts[part]
        said.append(found)
        if capture.tail == 0:
            # the most probable ones, exactly
            kept = new.targets.head_ids[row]
            np.testing.assert_allclose(found[kept], wanted[-1][kept], atol=2e-3)
            assert found.sum() >= np.sort(wanted[-1])[-len(kept) :].sum() - 2e-3
            nonzero = wanted[-1][wanted[-1] > 0]
            entropy = -(nonzero * np.log(nonzero)).sum()
            assert new.targets.entropy[row] == pytest.approx(entropy, abs=0.02)
    assert seen > 15 or name == "added"
    exact = exact[len(exact) - seen :]  # the codec learned from some of the rows before
    np.testing.assert_allclose(exact, wanted, atol=2e-3 if kind == "whole" else 1e-4)
    if seen and capture.tail:
        # equally spaced draws are off by less than one at each token
        assert np.abs(np.array(said) - np.array(wanted)).max() < 1.01 / new.capture.tail


def test_the_label_is_certain_where_nothing_else_is_known() -> None:
    """However improbable its chunk is, and whatever a head or samples say of other chunks."""
    beginnings = Beginnings([[1, 2, 3], [1], [4, 5]], 6)
    known = Continuations(beginnings, np.array([1.0, 2.0, 1.0]), 6)
    capture = Capture(head=1, tail=2)
    logits = np.log(np.array([[0.5, 0.3, 0.2]] * 2))
    records = records_of(logits, np.array([1, 1], np.int32), capture, seed=0)
    for node in (-1, 0):
        inside = Inside(
            rows_I=np.array([0, 1]),
            nodes_I=np.array([node, node]),
            depths_I=np.array([1, 2]),
            labels_I=np.array([5, 0]),
            firsts_I=np.array([1, 1]),
            logprobs_I=np.array([-900.0, -2.0], np.float32),
        )
        entries, entropy_I = known.entries(records, capture.tail, inside)
        assert entries.ids_E.tolist() == [5, 0]
        assert entries.masses_E.tolist() == [1.0, 1.0]
        assert not entropy_I.any()
