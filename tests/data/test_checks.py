from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.checks import Finding, Rules, check_block
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Block, Capture, Sequences, Targets, sequence_hash
from oracles import FULL, LENGTH, VOCABULARY, draws, random_block

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = random_block(8, 10)
WHOLE = Capture(head=VOCABULARY, tail=0)
INF, NAN, LOG_V = math.inf, math.nan, math.log(VOCABULARY)


def rules_for(capture: Capture, **changed: Any) -> Rules:
    exact = Rules(
        vocabulary=VOCABULARY, sequence_length=LENGTH, capture=capture, maximum=0.0, rounding=0.0
    )
    return replace(exact, **changed)


def place_of(block: Block, label: str) -> int:
    """A position, not in the first sequence, whose label is in the head, in the tail or in neither,
    and whose tail samples differ."""
    targets, labels_M = block.targets, labels(block.sequences)[:, None]
    found = {
        "head": (targets.head_ids == labels_M).any(1),
        "tail": (draws(targets.tail) == labels_M).any(1),
    }
    found["neither"] = ~(found["head"] | found["tail"])
    later_M = np.arange(len(targets)) >= block.sequences.positions.offsets[1]
    if block.capture.tail:
        later_M &= targets.tail.lengths > 1
    return int(np.flatnonzero(found[label] & later_M)[0])


def with_target(block: Block, field: str, place: int, change: Any) -> Block:
    """Another value at one position. A field of the samples is named `tail.ids` and so on."""
    own, at = place_in(block.targets, field, place)
    array = own.copy()
    array[at] = change(block.targets, place)
    changed: Any = {field: array}
    if field.startswith("tail."):
        changed = {"tail": replace(block.targets.tail, **{field[5:]: array})}
    return replace(block, targets=replace(block.targets, **changed))


def place_in(targets: Targets, field: str, place: int) -> tuple[NDArray[Any], Any]:
    """The array of a field, and where its values of one position are."""
    if field.startswith("tail."):
        first, last = targets.tail.offsets[place : place + 2].tolist()
        return getattr(targets.tail, field[5:]), slice(first, last)
    return getattr(targets, field), place


def where(block: Block, place: int) -> tuple[int, int]:
    """The index of the sequence in the block, and of the position in the sequence."""
    positions = block.sequences.positions
    row = int(np.searchsorted(positions.offsets, place, side="right")) - 1
    return row, int(positions.values[place])


def rehashed(sequences: Sequences) -> Sequences:
    parts = zip(sequences.tokens, sequences.document_starts, sequences.positions, strict=True)
    return replace(sequences, hashes=np.array([sequence_hash(*p) for p in parts], np.uint64))


def with_row(block: Block, field: str, row: int, change: Any) -> Block:
    """One list of one sequence changed, its checksum made to fit."""
    column = getattr(block.sequences, field)
    rows = [values.tolist() for values in column]
    rows[row] = change(rows[row], len(block.sequences.tokens[row]))
    changed: Any = Ragged.from_rows(rows, column.values.dtype)
    return replace(block, sequences=rehashed(replace(block.sequences, **{field: changed})))


def row_with(documents: int, positions: int) -> int:
    """A sequence after the first with at least this many documents and supervised positions."""
    sequences = BLOCK.sequences
    enough = sequences.document_starts.lengths >= documents
    enough &= sequences.positions.lengths >= positions
    return int(np.flatnonzero(enough[1:])[0]) + 1


def others(block: Block, row: int) -> Block:
    return block.take(np.delete(np.arange(len(block)), row))


def entry(field: str, at: int, value: float) -> Any:
    """A row of the field with one entry replaced."""

    def change(targets: Targets, place: int) -> NDArray[Any]:
        array, where = place_in(targets, field, place)
        row: NDArray[Any] = array[where].copy()
        row[at] = value
        return row

    return change


def order(field: str, *places: int) -> Any:
    """A row of the field in another order."""
    return lambda targets, place: getattr(targets, field)[place][list(places)]


def always(value: float) -> Any:
    return lambda targets, place: value


def of(field: str, at: Any = ..., by: float = 0.0) -> Any:
    """The value of another field at the position, or a number near it."""

    def value(targets: Targets, place: int) -> Any:
        array, where = place_in(targets, field, place)
        return array[where][at] + by

    return value


HEAD_NUMBERS = "head log-probabilities above 0, or not numbers"
RISING = "head log-probabilities that increase"
SUM = "head and tail that do not sum to 1"
TAIL_MASS = "a tail mass above 1, or none"
BESIDE = "a tail beside a head of the whole vocabulary"
TAIL_NUMBERS = "tail log-probabilities above 0, or not numbers"
TAIL_ABOVE = "tail samples above the head's last entry"
ENTROPY = "an entropy that is not in [0, log V]"
LABEL_NUMBER = "a label log-probability above 0, or not a number"
LABEL_HEAD = "a label's log-probability is not its entry in the head"
LABEL_ABOVE = "a label outside the head is above the head's last entry"
LABEL_TAIL = "a label's log-probability is not that of its tail sample"
COLD, WARM = (f"a log_norm that temperature {t} cannot have" for t in ("0.5", "2"))

TARGETS: list[tuple[str, str, list[Any], set[str]]] = [
    ("neither", "head_ids", [order("head_ids", 0, 0, 2, 3)], {"head ids that repeat"}),
    ("neither", "head_ids", [order("head_ids", 0, 1, 2, 0)], {"head ids that repeat"}),
    (
        "neither",
        "head_ids",
        [entry("head_ids", 2, 40), entry("head_ids", 0, -1)],
        {"head ids outside the vocabulary"},
    ),
    ("neither", "head_logprobs", [order("head_logprobs", 0, 2, 1, 3)], {RISING}),
    (
        "neither",
        "head_logprobs",
        [entry("head_logprobs", 0, NAN), entry("head_logprobs", 0, -INF)],
        {HEAD_NUMBERS, RISING, SUM},
    ),
    (
        "neither",
        "head_logprobs",
        [entry("head_logprobs", 0, INF), entry("head_logprobs", 0, 0.5)],
        {HEAD_NUMBERS, SUM},
    ),
    ("neither", "log_tail", [always(v) for v in (0.5, -INF, INF, NAN)], {TAIL_MASS, SUM}),
    ("neither", "log_tail", [of("log_tail", by=-0.1)], {SUM}),
    (
        "neither",
        "tail.ids",
        [entry("tail.ids", -1, 40), entry("tail.ids", 0, -1)],
        {"tail ids outside the vocabulary"},
    ),
    ("neither", "tail.ids", [of("tail.ids", 0)], {"tail ids that repeat"}),
    (
        "neither",
        "tail.ids",
        [
            lambda targets, place: [
                targets.head_ids[place, 3],
                *of("tail.ids", slice(1, None))(targets, place),
            ]
        ],
        {"tail ids that are in the head"},
    ),
    (
        "neither",
        "tail.counts",
        [entry("tail.counts", 0, 0), entry("tail.counts", 0, 9), of("tail.counts", by=1)],
        {"samples that were not drawn 3 times together"},
    ),
    (
        "neither",
        "tail.logprobs",
        [entry("tail.logprobs", 1, v) for v in (NAN, -INF, INF)],
        {TAIL_NUMBERS},
    ),
    ("neither", "tail.logprobs", [entry("tail.logprobs", 1, 0.5)], {TAIL_NUMBERS, TAIL_ABOVE}),
    ("neither", "tail.logprobs", [of("head_logprobs", 2)], {TAIL_ABOVE}),
    ("neither", "entropy", [always(v) for v in (-1.0, LOG_V + 0.01, NAN, INF)], {ENTROPY}),
    ("neither", "label_logprob", [always(0.5)], {LABEL_NUMBER, LABEL_ABOVE}),
    ("neither", "label_logprob", [always(v) for v in (INF, -INF, NAN)], {LABEL_NUMBER}),
    ("neither", "label_logprob", [of("head_logprobs", 0)], {LABEL_ABOVE}),
    ("head", "label_logprob", [of("label_logprob", by=-0.1)], {LABEL_HEAD}),
    ("tail", "label_logprob", [of("label_logprob", by=-0.1)], {LABEL_TAIL}),
    ("neither", "log_norm", [entry("log_norm", 0, v) for v in (0.1, -LOG_V - 0.1, NAN)], {COLD}),
    (
        "neither",
        "log_norm",
        [entry("log_norm", 1, v) for v in (-0.1, LOG_V / 2 + 0.1, INF)],
        {WARM},
    ),
]
"""Where the label is, the field, its changes, and what is found."""


def test_a_captured_block_breaks_no_rule() -> None:
    shapes = [Capture(head=head, tail=tail) for head, tail in ((0, 2), (2, 0), (0, 0))]
    for capture in (FULL, WHOLE, *shapes, Capture(head=1, tail=1, temperatures=(4.0,))):
        for seed in range(10):
            assert check_block(random_block(seed, 10, capture), 10, rules_for(capture)) == []


def test_each_rule_about_targets_reports_the_position() -> None:
    for label, field, changes, expected in TARGETS:
        place = place_of(BLOCK, label)
        row, position = where(BLOCK, place)
        for change in changes:
            broken = with_target(BLOCK, field, place, change)
            found = check_block(broken, len(BLOCK), rules_for(FULL))
            assert {finding.what for finding in found} == expected
            assert {(f.row, f.position, f.count) for f in found} == {(row, position, 1)}
            assert check_block(others(broken, row), len(BLOCK) - 1, rules_for(FULL)) == []


def test_a_label_and_its_entry_that_are_both_wrong_are_found() -> None:
    for label, numbers in (("head", HEAD_NUMBERS), ("tail", TAIL_NUMBERS)):
        for value in (INF, -INF, NAN):
            place = place_of(BLOCK, label)
            field = {"head": "head_logprobs", "tail": "tail.logprobs"}[label]
            broken = with_target(BLOCK, field, place, always(value))
            broken = with_target(broken, "label_logprob", place, always(value))
            found = check_block(broken, len(BLOCK), rules_for(FULL))
            assert {(f.row, f.position) for f in found} == {where(BLOCK, place)}
            assert {LABEL_NUMBER, numbers} <= {finding.what for finding in found}


def test_a_tail_beside_a_head_of_the_whole_vocabulary_is_found() -> None:
    block = random_block(3, 10, WHOLE)
    place = place_of(block, "head")
    broken = with_target(block, "log_tail", place, always(-20.0))
    assert check_block(broken, 10, rules_for(WHOLE)) == [Finding(BESIDE, *where(block, place))]


def test_a_rule_that_is_broken_often_reports_the_first_place_and_the_count() -> None:
    entropy = BLOCK.targets.entropy.copy()
    entropy[[4, 7, 9]] = -1.0
    broken = replace(BLOCK, targets=replace(BLOCK.targets, entropy=entropy))
    expected = Finding(ENTROPY, *where(BLOCK, 4), count=3)
    assert check_block(broken, len(BLOCK), rules_for(FULL)) == [expected]


def test_rounding_is_allowed_up_to_the_error_of_the_codec() -> None:
    place = place_of(BLOCK, "head")

    def found(field: str, by: float, **allowed: float) -> set[str]:
        broken = with_target(BLOCK, field, place, lambda t, at: getattr(t, field)[at] + by)
        findings = check_block(broken, len(BLOCK), rules_for(FULL, **allowed))
        return {finding.what for finding in findings}

    assert found("label_logprob", -0.01) == {LABEL_HEAD}
    assert found("label_logprob", -0.01, rounding=0.011) == set()
    assert found("label_logprob", -0.02, rounding=0.011) == {LABEL_HEAD}
    assert found("label_logprob", -0.5, maximum=0.5) == set()


MISPLACED = "supervised positions do not increase, or have no next token in their document"
BORDERS = "document borders do not begin at 0 and increase inside the sequence"
DOCUMENTS = "documents are not one for each border, or below 0"
TOKENS = f"token ids outside the vocabulary of {VOCABULARY}"

ROWS: list[tuple[str, Any, str]] = [
    ("tokens", lambda row, length: [VOCABULARY, *row[1:]], TOKENS),
    ("tokens", lambda row, length: [-1, *row[1:]], TOKENS),
    ("document_ids", lambda row, length: [*row, 0], DOCUMENTS),
    ("document_ids", lambda row, length: row[1:], DOCUMENTS),
    ("document_ids", lambda row, length: [-1, *row[1:]], DOCUMENTS),
    ("positions", lambda row, length: [row[1], row[0], *row[2:]], MISPLACED),
    ("positions", lambda row, length: [row[0], row[0], *row[2:]], MISPLACED),
    ("positions", lambda row, length: [-1, *row[1:]], MISPLACED),
    ("positions", lambda row, length: [*row[:-1], length - 1], MISPLACED),
    ("positions", lambda row, length: [*row[:-1], 2**31 - 1], MISPLACED),
]


def test_each_rule_about_sequences_reports_the_sequence() -> None:
    row = row_with(documents=2, positions=2)
    for field, change, expected in ROWS:
        broken = with_row(BLOCK, field, row, change)
        assert check_block(broken, len(BLOCK), rules_for(FULL)) == [Finding(expected, row)]
        assert check_block(others(broken, row), len(BLOCK) - 1, rules_for(FULL)) == []


def test_impossible_borders_of_documents_are_found() -> None:
    row = row_with(documents=2, positions=2)
    # with the last, the first document ends right after the first supervised position
    border = int(BLOCK.sequences.positions[row][0]) + 1
    changes: list[tuple[Any, str]] = [
        (lambda old, length: old[1:], BORDERS),
        (lambda old, length: [*old[:-1], length], BORDERS),
        (lambda old, length: [0, 0, *old[2:]], BORDERS),
        (lambda old, length: [0, -1, *old[2:]], BORDERS),
        (lambda old, length: [], BORDERS),
        (lambda old, length: [0, border], MISPLACED),
    ]
    for change, expected in changes:
        broken = with_row(BLOCK, "document_starts", row, change)
        kept = len(broken.sequences.document_starts[row])
        broken = with_row(broken, "document_ids", row, lambda ids, length: ids[:kept])  # noqa: B023
        assert check_block(broken, len(BLOCK), rules_for(FULL)) == [Finding(expected, row)]


def test_a_sequence_without_tokens_or_with_too_many_is_found() -> None:
    lengths_N = BLOCK.sequences.tokens.lengths
    most = int(lengths_N.max())
    found = check_block(BLOCK, len(BLOCK), rules_for(FULL, sequence_length=most - 1))
    rows = np.flatnonzero(lengths_N == most)
    what = f"holds no token, or more than {most - 1}"
    assert found == [Finding(what, int(rows[0]), count=len(rows))]
    row = int(np.flatnonzero(BLOCK.sequences.positions.lengths == 0)[0])
    empty = with_row(BLOCK, "tokens", row, lambda old, length: [])
    what = f"holds no token, or more than {LENGTH}"
    found = check_block(empty, len(BLOCK), rules_for(FULL))
    assert found == [Finding(what, row), Finding(BORDERS, row)]


def test_wrong_hashes_and_sizes_are_found() -> None:
    hashes = BLOCK.sequences.hashes.copy()
    hashes[[3, 5]] += np.uint64(1)
    broken = replace(BLOCK, sequences=replace(BLOCK.sequences, hashes=hashes))
    found = check_block(broken, len(BLOCK), rules_for(FULL))
    assert [finding.row for finding in found] == [3, 5]
    assert found[0].what.startswith("sequence 3 is not what was written: ")
    assert check_block(BLOCK, 9, rules_for(FULL)) == [Finding("holds 10 sequences, expected 9")]


SEQUENCE_SHAPES: list[tuple[str, Any]] = [
    ("ids", lambda array: array.astype(np.int32)),
    ("hashes", lambda array: array.astype(np.int64)),
    ("tokens", lambda ragged: Ragged(ragged.values.astype(np.int64), ragged.offsets)),
    ("positions", lambda ragged: Ragged(ragged.values[:, None], ragged.offsets)),
    ("document_starts", lambda ragged: Ragged(ragged.values, ragged.offsets[:-1])),
    ("document_ids", lambda ragged: Ragged(ragged.values.astype(np.int32), ragged.offsets)),
]
TARGET_SHAPES: list[tuple[str, Any]] = [
    ("head_ids", lambda array: array[:, :-1]),
    ("head_logprobs", lambda array: array.astype(np.float64)),
    ("log_tail", lambda array: array[:-1]),
    ("tail.ids", lambda array: array.astype(np.int64)),
    ("tail.counts", lambda array: array.astype(np.float32)),
    ("tail.logprobs", lambda array: None),
    ("log_norm", lambda array: array[:, :1]),
]


@pytest.mark.parametrize(("field", "change"), SEQUENCE_SHAPES + TARGET_SHAPES)
def test_only_a_wrong_shape_or_type_is_reported(field: str, change: Any) -> None:
    part = "targets" if (field, change) in TARGET_SHAPES else "sequences"
    whole: Any = getattr(BLOCK, part)
    if field.startswith("tail."):
        own: Any = whole.tail
        changed: Any = {"tail": replace(own, **{field[5:]: change(getattr(own, field[5:]))})}
    else:
        changed = {field: change(getattr(whole, field))}
    broken = replace(BLOCK, **{part: replace(whole, **changed)})
    (finding,) = check_block(broken, len(BLOCK), rules_for(FULL))
    assert finding.what.startswith(f"'{field}' ")
