"""Words beside the text of a store in a student's tokens, against slow loops over its record."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.checks import Rules, check_block
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.retokenize import Decisions, _Mapping, retokenize
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shrink import shrink
from coldstill.data.maintenance.verify import verify
from coldstill.data.ragged import Ragged
from coldstill.data.retokenized import drawn as drawing
from coldstill.data.retokenized.drawn import DRAWS
from coldstill.data.retokenized.spelling import Speller
from coldstill.data.schema import Block, Capture
from coldstill.data.store.reader import open_store
from oracles import assert_same, everything
from refusals import refusal
from retokenizing import CAPTURES, TEXTS, loaded, matched
from spellings import END, text_store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest_plugins = ("retokenized_stores",)
Word = tuple[int, int, tuple[int, ...]]
Weights = defaultdict[Word, float]
"""A sequence, a position in it and the tokens of a word."""


def drawn(block: Block) -> Weights:
    """The weights of all branches, by sequence, place and word."""
    branches = block.sequences.branches
    assert branches is not None
    found: Weights = defaultdict(float)
    for row in range(len(block)):
        start = 0
        for place, size, weight in zip(
            branches.places[row], branches.sizes[row], branches.weights[row], strict=True
        ):
            word = tuple(branches.tokens[row][start : start + size].tolist())
            assert len(word) == size
            found[row, int(place), word] += float(weight)
            start += size
        assert start == len(branches.tokens[row])
    return found


def believed(old: Block, new: Block, folder: Path, name: str, ambiguous: str = "split") -> Weights:
    """What the records say of every word of several tokens, where a chunk begins."""
    teacher, student = loaded(folder / "teacher"), loaded(folder / name)
    pieces: dict[int, tuple[int, ...]] = {
        index: tuple(piece.id for piece in student.model.tokenize(token))
        for token, index in teacher.get_vocab().items()
        if token != END  # which is one token for both
    }
    places = [
        (row, position)
        for row, positions in enumerate(new.sequences.positions)
        for position in positions.tolist()
    ]
    found: Weights = defaultdict(float)
    targets, draws = old.targets, max(1, old.capture.tail)
    begun = begun_longer(teacher, student) if ambiguous != "map" else set()
    asked, theirs_first = labels(old.sequences), labels(new.sequences)
    seen: defaultdict[int, list[int]] = defaultdict(list)
    for theirs, ours in matched(old, new, teacher, student):
        seen[int(asked[theirs])].append(int(theirs_first[ours]))
    for rows in zip(old.sequences.tokens, new.sequences.tokens, old.sequences.document_starts,
                    new.sequences.document_starts, strict=True):  # fmt: skip
        for theirs, ours in zip(rows[2].tolist(), rows[3].tolist(), strict=True):
            seen[int(rows[0][theirs])].append(int(rows[1][ours]))
    spelled: defaultdict[int, float] = defaultdict(lambda: 1.0)
    for index in begun & pieces.keys():
        first = pieces[index][0]
        share = (seen[index].count(first) + 0.5) / (len(seen[index]) + 0.5)
        spelled[index] = share if ambiguous == "split" else 0.0
    for theirs, ours in matched(old, new, teacher, student):
        if new.targets.chunk_sizes[ours, 0] <= 0:
            continue
        said: defaultdict[int, float] = defaultdict(float)
        for slot, index in enumerate(targets.head_ids[theirs].tolist()):
            said[index] += math.exp(targets.head_logprobs[theirs, slot])
        for entry in range(*targets.tail.offsets[theirs : theirs + 2].tolist()):
            each = math.exp(targets.log_tail[theirs]) / draws
            said[int(targets.tail.ids[entry])] += each * int(targets.tail.counts[entry])
        for index, mass in said.items():
            if len(pieces.get(index, ())) > 1 and spelled[index] > 0:
                row, position = places[ours]
                if position + len(pieces[index]) - 1 < new.sequences.tokens.lengths.max():
                    found[row, position, pieces[index]] += mass * spelled[index]
    return found


def begun_longer(teacher: Any, student: Any) -> set[int]:
    """Tokens of the teacher with which it spells a longer token of the student first."""
    found = set()
    for token in student.get_vocab():
        spelling = teacher.model.tokenize(token) if token != END else []
        if len(spelling) > 1:
            found.add(spelling[0].id)
    return found


@pytest.mark.parametrize("kind", CAPTURES)
@pytest.mark.parametrize("name", ["removed", "bytes", "joined"])
def test_branches_stand_for_the_probability_of_their_words(
    folder: Path, tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over many seeds the mean weight of a word at a place is its probability in the record."""
    total: Weights = defaultdict(float)
    each_draw: defaultdict[int, float] = defaultdict(float)
    seeds = 60
    wanted: Weights = defaultdict(float)
    old = text_store(tmp_path / "old", folder / "teacher", TEXTS, CAPTURES[kind])
    for seed in range(seeds):
        monkeypatch.setattr(drawing, "_SEED", seed)
        path = tmp_path / f"{seed}"
        retokenize(str(tmp_path / "old"), str(path), folder / name, Decisions(branches=0.3))
        new = everything(path)
        wanted = wanted or believed(old, new, folder, name)
        found = drawn(new)
        assert found.keys() <= wanted.keys()
        for word, weight in found.items():
            total[word] += weight
            each_draw[word[0]] = max(each_draw[word[0]], weight)
        for row, tokens in enumerate(new.sequences.tokens):
            mass = sum(each for word, each in wanted.items() if word[0] == row)
            kept = sum(word[0] == row for word in found)
            assert kept <= math.ceil(min(0.3 * len(tokens), DRAWS * mass))
            # equally spaced points leave nothing of the sum to chance
            own = sum(each for word, each in found.items() if word[0] == row)
            assert own == pytest.approx(mass, rel=1e-5)
    assert len(wanted) > 5
    for word, mass in wanted.items():
        # at most the variance of independent draws
        deviation = math.sqrt(each_draw[word[0]] * mass / seeds)
        assert abs(total[word] / seeds - mass) < 5 * deviation


def test_a_store_without_branches_is_the_same_in_every_other_number(
    folder: Path, stores: Callable[..., str], tmp_path: Path
) -> None:
    for share in (0.0, 0.25):
        decisions = Decisions(branches=share)
        retokenize(stores("both"), str(tmp_path / f"{share}"), folder / "bytes", decisions)
        assert not list(verify(str(tmp_path / f"{share}")))
    without, beside = (everything(tmp_path / f"{share}") for share in (0.0, 0.25))
    assert without.sequences.branches is None
    assert beside.sequences.branches is not None
    assert not without.capture.branches
    assert beside.capture.branches
    assert_same(
        Block(
            sequences=replace(beside.sequences, branches=None),
            targets=beside.targets,
            capture=without.capture,
        ),
        without,
    )
    manifest = open_store(tmp_path / "0.0").manifest.to_json()
    assert "branches" not in manifest["capture"]
    assert not manifest["retokenized"].keys() & {"branches", "spelled_mass"}
    made = open_store(tmp_path / "0.25").manifest.retokenized
    assert made is not None
    weights = sum(drawn(beside).values())
    # words behind the longest sequence are not drawn
    assert 0.8 * made.spelled_mass < weights <= made.spelled_mass * (1 + 1e-5)
    text_store(tmp_path / "more", folder / "teacher", TEXTS[::-1], CAPTURES["both"], seed=4,
               corpus="4", shard_sequences=2, block_sequences=1)  # fmt: skip
    retokenize(str(tmp_path / "more"), str(tmp_path / "further"), folder / "bytes")
    other = open_store(tmp_path / "further").manifest.retokenized
    assert other is not None
    assert made.plus(other).spelled_mass == made.spelled_mass + other.spelled_mass


def test_tokens_that_are_only_renumbered_need_no_branches(
    folder: Path, stores: Callable[..., str], tmp_path: Path
) -> None:
    retokenize(stores(), str(tmp_path / "new"), folder / "permuted")
    new = everything(tmp_path / "new")
    assert new.sequences.branches is None
    assert not new.capture.branches


def test_every_operation_on_stores_keeps_the_branches(
    folder: Path, stores: Callable[..., str], tmp_path: Path
) -> None:
    retokenize(stores("both"), str(tmp_path / "new"), folder / "bytes")
    wanted = drawn(everything(tmp_path / "new"))
    assert len(wanted) > 10
    for codec, form in (("compact", "zarr"), ("plain", "arrow"), ("compact", "arrow")):
        path = tmp_path / f"{codec}-{form}"
        convert(str(tmp_path / "new"), str(path), codec, form)
        assert not list(verify(str(path)))
        assert drawn(everything(path)) == wanted
    shrink(str(tmp_path / "new"), str(tmp_path / "small"), 2, 3)
    assert drawn(everything(tmp_path / "small")) == wanted
    # a store of other texts
    text_store(tmp_path / "more", folder / "teacher", TEXTS[::-1], CAPTURES["both"], seed=4,
               corpus="4", shard_sequences=2, block_sequences=1)  # fmt: skip
    retokenize(str(tmp_path / "more"), str(tmp_path / "further"), folder / "bytes")
    own = drawn(everything(tmp_path / "further"))
    parts = [str(tmp_path / "new"), str(tmp_path / "further")]
    merge(parts, str(tmp_path / "both"), None, None)
    count = len(everything(tmp_path / "new"))
    moved = {(row + count, place, word): each for (row, place, word), each in own.items()}
    assert drawn(everything(tmp_path / "both")) == {**wanted, **moved}
    for share, named in ((0.0, "capture.branches"), (0.1, "retokenized.branches")):
        other = str(tmp_path / f"{share}")
        retokenize(str(tmp_path / "more"), other, folder / "bytes", Decisions(branches=share))
        for parts in ([str(tmp_path / "new"), other], [other, str(tmp_path / "new")]):
            line = refusal(merge, parts, str(tmp_path / "no"), None, None)
            assert named in line


def test_damaged_branches_are_found(
    folder: Path, stores: Callable[..., str], tmp_path: Path
) -> None:
    retokenize(stores(), str(tmp_path / "new"), folder / "bytes")
    store = open_store(tmp_path / "new")
    block, manifest = everything(tmp_path / "new"), store.manifest
    rules = Rules(
        capture=manifest.capture, vocabulary=manifest.tokenizer.size,
        sequence_length=manifest.packing.sequence_length, rounding=0.0, maximum=0.0,
    )  # fmt: skip
    branches = block.sequences.branches
    assert branches is not None

    def findings(**changed: Ragged) -> set[str]:
        sequences = replace(block.sequences, branches=replace(branches, **changed))
        found = Block(sequences=sequences, targets=block.targets, capture=block.capture)
        return {finding.what for finding in check_block(found, len(block), rules)}

    assert findings() == set()
    places, tokens, weights = branches.places, branches.tokens, branches.weights
    order = "branches that are not in order, or leave at a place that is not learned"
    last = int(block.sequences.tokens.lengths.max()) - 1
    for values in (places.values[::-1], places.values * 0 - 1):
        assert order in findings(places=Ragged(values, places.offsets))
    values = np.full_like(places.values, last)
    assert findings(places=Ragged(values, places.offsets)) == {
        order, "branches that are read beyond the sequence length",
    }  # fmt: skip
    wrong = np.full_like(tokens.values, rules.vocabulary)
    assert findings(tokens=Ragged(wrong, tokens.offsets)) == {
        "tokens of branches outside the vocabulary"
    }
    for number in (0.0, -1.0, math.nan, math.inf):
        values = np.full_like(weights.values, number)
        assert findings(weights=Ragged(values, weights.offsets)) == {
            "branches with a weight that is not above 0"
        }
    none = Block(
        sequences=replace(block.sequences, branches=None), targets=block.targets,
        capture=block.capture,
    )  # fmt: skip
    [finding] = check_block(none, len(block), rules)
    assert finding.what == "has branches, or none, against its manifest"


def test_a_writer_of_stores_cannot_promise_branches(tmp_path: Path) -> None:
    import coldstill

    line = refusal(
        coldstill.StoreWriter, tmp_path / "s", capture=Capture(tail=2, branches=True),
        teacher="t", vocabulary=9, sequence_length=8,
    )  # fmt: skip
    assert "chunks, branches and guessed_labels are found out, not chosen" in line


def test_words_whose_weight_would_round_to_0_are_not_drawn(
    folder: Path, stores: Callable[..., str]
) -> None:
    """Verification would find such a weight."""
    store, block = open_store(stores("head")), everything(stores("head"))
    teacher, student = (Speller(folder / name, name) for name in ("teacher", "bytes"))
    for lower, some in ((0.0, True), (80.0, True), (150.0, False)):
        targets = replace(block.targets, head_logprobs=block.targets.head_logprobs - lower)
        given = Block(sequences=block.sequences, targets=targets, capture=block.capture)
        work = _Mapping(teacher, student, store.manifest, Decisions())
        work.measure(given)
        work.measured()
        branches = work.block(given).sequences.branches
        assert branches is not None
        assert (len(branches.weights.values) > 0) is some
        assert (branches.weights.values > 0).all()


@pytest.mark.parametrize("ambiguous", ["split", "map", "bucket"])
def test_an_ambiguous_word_has_the_probability_that_its_first_token_has(
    folder: Path, stores: Callable[..., str], tmp_path: Path, ambiguous: Any
) -> None:
    """The teacher begins " unlikely", one token of the student, with " un"."""
    decisions = Decisions(ambiguous=ambiguous)
    retokenize(stores("head"), str(tmp_path / "new"), folder / "joined", decisions)
    old, new = everything(stores("head")), everything(tmp_path / "new")
    un = tuple(loaded(folder / "joined").encode(" un").ids)
    assert len(un) == 2

    def total(weights: Weights, *, of_un: bool) -> float:
        return sum(each for word, each in weights.items() if (word[2] == un) is of_un)

    kept, found = believed(old, new, folder, "joined", ambiguous), drawn(new)
    both = total(kept, of_un=True) + total(kept, of_un=False)
    assert total(found, of_un=True) + total(found, of_un=False) == pytest.approx(both, rel=1e-5)
    whole = total(believed(old, new, folder, "joined", "map"), of_un=True)
    assert whole > 0
    if ambiguous == "bucket":
        assert total(found, of_un=True) == 0
    expected = {"map": 1.0, "bucket": 0.0}.get(ambiguous)
    share = total(kept, of_un=True) / whole
    assert share == expected if expected is not None else 0.1 < share < 0.9
