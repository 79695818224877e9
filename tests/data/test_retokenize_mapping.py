"""Records in a student's tokens: mapped distributions and samples, against enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.retokenize import Decisions, retokenize
from coldstill.data.maintenance.verify import verify
from coldstill.data.retokenized.continued import Continuations
from coldstill.data.retokenized.known import KnownTokens
from coldstill.data.retokenized.mapping import Shares, map_tokens
from coldstill.data.retokenized.records import RecordMap, mapped_capture
from coldstill.data.retokenized.spelling import Speller
from coldstill.data.schema import Block, Capture
from oracles import everything
from retokenizing import TEXTS, loaded, matched
from spellings import (
    END,
    byte_pairs,
    packed,
    random_records,
    records_of,
    saved,
    text_store,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.store.retokenized import Ambiguous
    from numpy.typing import NDArray

pytest_plugins = ("retokenized_stores",)


def first_tokens(teacher: Any, student: Any) -> NDArray[np.int64]:
    """The student's first token for the bytes of each token of the teacher, by its own encoding."""
    found = np.full(teacher.get_vocab_size(), -1)
    for token, index in teacher.get_vocab().items():
        if token == END:
            found[index] = student.token_to_id(END)
        else:
            found[index] = student.model.tokenize(token)[0].id
    return found


@pytest.mark.parametrize("name", ["added", "removed", "bytes"])
def test_a_whole_distribution_is_mapped_exactly(folder: Path, tmp_path: Path, name: str) -> None:
    teacher, student = loaded(folder / "teacher"), loaded(folder / name)
    size = teacher.get_vocab_size()
    sequences = packed(teacher, TEXTS)
    targets, p_MV = random_records(0, labels(sequences), Capture(head=size, tail=0), size)
    block = Block(sequences=sequences, targets=targets, capture=Capture(head=size, tail=0))
    text_store(tmp_path / "old", folder / "teacher", block, block.capture)
    alone = Decisions(ambiguous="map")
    retokenize(str(tmp_path / "old"), str(tmp_path / "new"), folder / name, alone)
    new = everything(tmp_path / "new")
    mapped_MV = np.zeros((len(p_MV), student.get_vocab_size()))
    np.add.at(mapped_MV.T, first_tokens(teacher, student), p_MV.T)
    begins = np.flatnonzero(new.targets.chunk_sizes[:, 0])
    # the teacher's position at which each chunk begins, by the text before it
    wanted = [row for row, _ in matched(block, new, teacher, student)]
    assert len(wanted) == len(begins) > 40
    dense = np.zeros((len(begins), student.get_vocab_size()))
    np.put_along_axis(
        dense, new.targets.head_ids[begins].astype(np.int64),
        np.exp(new.targets.head_logprobs[begins].astype(np.float64)), axis=1,
    )  # fmt: skip
    np.testing.assert_allclose(dense, mapped_MV[wanted], atol=1e-6)
    terms = np.where(dense > 1e-20, dense * np.log(dense + 1e-300), 0.0)
    np.testing.assert_allclose(new.targets.entropy[begins], -terms.sum(1), atol=1e-4)


@pytest.mark.parametrize("name", ["bytes", "added"])
def test_samples_and_records_with_samples_are_unbiased(folder: Path, name: str) -> None:
    """Over many draws of one distribution, the mean of what a record says is the mapped one."""
    teacher, student = Speller(folder / "teacher", "a"), Speller(folder / name, "b")
    table = map_tokens(teacher, student, {})
    random = np.random.default_rng(3)
    logits_V = random.normal(0.0, 2.0, teacher.size)
    shares = None
    if name == "added":  # " un" may begin " unlikely"
        ours, theirs = teacher.vocabulary["Ġun"], student.vocabulary
        shares = Shares.counted(table, {(ours, theirs["Ġunlikely"]): 2, (ours, theirs["Ġun"]): 1})
        assert shares.shares[shares.offsets_V[ours] :][:2].max() == 2 / 3.5
        logits_V[ours] = logits_V.max()
    p_V = np.exp(logits_V) / np.exp(logits_V).sum()
    mapped_V = np.bincount(table.first_V, p_V, minlength=student.size)
    if shares is None:
        assert np.count_nonzero(mapped_V) < teacher.size
    else:
        mapped_V[theirs["Ġunlikely"]] += p_V[ours] * 2 / 3.5
        mapped_V[theirs["Ġun"]] -= p_V[ours] * 2 / 3.5
    rows = 4000
    loaded_student = loaded(folder / name)
    sequences = packed(loaded_student, ["the " * 60] * (rows // 61 + 1), together=1)
    labels_M = labels(sequences)[:rows]
    for capture in (Capture(tail=6), Capture(head=5, tail=6), Capture(head=5, tail=2)):
        old = records_of(np.log(np.tile(p_V, (rows, 1))), labels_M, capture, seed=1)
        # independent shifts: `records_of` draws each position on its own
        new = mapped_capture(capture, teacher.size, student.size)
        known = KnownTokens(table, capture, new, shares=shares)
        alone = Continuations(table.beginnings, known.sums(old), student.size)
        made = RecordMap(known, alone, table, capture, new)(
            old, take_positions(sequences, rows), labels_M, np.ones(rows, np.int32),
            old.label_logprob, np.full(rows, -1, np.int32), labels_M,
        )  # fmt: skip
        said_MV = np.zeros((rows, student.size))
        np.put_along_axis(said_MV, made.head_ids.astype(np.int64), np.exp(made.head_logprobs), 1)
        each = np.exp(made.log_tail) / capture.tail
        np.add.at(
            said_MV, (made.tail.rows(), made.tail.ids), each[made.tail.rows()] * made.tail.counts
        )
        np.testing.assert_allclose(said_MV.sum(1), 1.0, atol=1e-5)
        least = np.sqrt(mapped_V / capture.tail)  # the deviation of independent draws
        error = np.maximum(said_MV.std(0), least) / np.sqrt(rows) + 1e-6
        assert (np.abs(said_MV.mean(0) - mapped_V) < 5 * error).all()


def take_positions(sequences: Any, count: int) -> Any:
    """Sequences that have exactly `count` positions."""
    from coldstill.data.ragged import Ragged

    lengths = np.minimum(
        sequences.positions.lengths, np.maximum(count - sequences.positions.offsets[:-1], 0)
    )
    rows = [sequences.positions[i][: lengths[i]] for i in range(len(sequences))]
    return replace(sequences, positions=Ragged.from_rows(rows, np.int32))


def enumerated(
    p: dict[str, dict[str, float]],
    end: str,
    depth: int,
    first: Callable[[str], str],
    joint: dict[tuple[str, str], float],
) -> tuple[dict[str, float], float]:
    """The true distribution of the student's first token after a text, under a teacher that is a
    chain over its tokens: every string of up to `depth` tokens, with its text spelled by the
    student. Also the probability of the strings that do not end within `depth`.

    p      probability of each token after each token
    first  the student's first token of a text, or the end token
    joint  gets the probability of each pair of first tokens, the teacher's and the student's
    """
    true: dict[str, float] = {}
    left = 0.0

    def walk(tokens: tuple[str, ...], mass: float) -> None:
        nonlocal left
        for token, share in p[tokens[-1] if tokens else "start"].items():
            if token == end:
                name = first("".join(tokens)) if tokens else end
                true[name] = true.get(name, 0.0) + mass * share
                pair = (tokens or (end,))[0], name
                joint[pair] = joint.get(pair, 0.0) + mass * share
            elif len(tokens) + 1 == depth:
                left += mass * share
            else:
                walk((*tokens, token), mass * share)

    walk((), 1.0)
    return true, left


def distance(one: dict[str, float], other: dict[str, float]) -> float:
    """Total variation."""
    return sum(abs(one.get(n, 0.0) - other.get(n, 0.0)) for n in one | other) / 2


def shared_out(
    p: dict[str, float], table: Any, joint: dict[tuple[str, str], float], ours: Any, theirs: Any
) -> dict[str, float]:
    """A distribution with ambiguous tokens shared out as a billion texts go on."""
    counts = {
        (ours.token_to_id(t), theirs.token_to_id(s)): round(1e9 * mass)
        for (t, s), mass in joint.items()
    }
    shares = Shares.counted(table, counts)
    made: dict[str, float] = {}
    for name, mass in p.items():
        index = ours.token_to_id(name)
        first, last = shares.offsets_V[index : index + 2].tolist()
        parts = zip(shares.ids[first:last], shares.shares[first:last], strict=True)
        for target, share in [*parts] or [(table.first_V[index], 1.0)]:
            token = theirs.id_to_token(int(target))
            made[token] = made.get(token, 0.0) + mass * float(share)
    return made


@pytest.mark.parametrize(
    ("ours", "theirs", "biased"),
    [
        ([("a", "b")], [], False),
        ([("1", "2"), ("12", "1")], [], False),
        ([("a", "b"), ("ab", "a")], [("a", "b")], False),
        ([], [("a", "b")], True),
        ([("a", "b")], [("a", "b"), ("ab", "b")], True),
        ([("b", "a")], [("a", "b")], True),
    ],
)
def test_the_bias_of_the_mapped_distribution_is_at_most_the_ambiguous_mass(
    tmp_path: Path, ours: list[tuple[str, str]], theirs: list[tuple[str, str]], biased: bool
) -> None:
    """Every text of a small teacher is enumerated and spelled by the student."""
    letters = ["1", "2"] if any("1" in pair[0] for pair in ours) else ["a", "b"]
    teacher, student = (byte_pairs(merges, alphabet=letters) for merges in (ours, theirs))
    own = Speller(saved(tmp_path / "teacher", teacher), "teacher")
    table = map_tokens(own, Speller(saved(tmp_path / "student", student), "student"), {})
    names = [teacher.id_to_token(i) for i in range(own.size)]
    random = np.random.default_rng(5)
    chain: dict[str, dict[str, float]] = {}
    for before in ["start", *names]:
        # canonical strings only: what the teacher's own tokenizer would write
        allowed = [
            name
            for name in names
            if name == END
            or before in ("start", END)
            or teacher.encode(before + name).tokens == [before, name]
        ]
        weights = random.random(len(allowed)) * [1.0 + 4.0 * (name == END) for name in allowed]
        chain[before] = dict(zip(allowed, (weights / weights.sum()).tolist(), strict=True))
    joint: dict[tuple[str, str], float] = {}
    true, left = enumerated(chain, END, 10, lambda text: student.encode(text).tokens[0], joint)
    mapped: dict[str, float] = {}
    ambiguous = 0.0
    for name, share in chain["start"].items():
        index = teacher.token_to_id(name)
        target = student.id_to_token(int(table.first_V[index]))
        mapped[target] = mapped.get(target, 0.0) + share
        ambiguous += share * bool(table.ambiguous_V[index])
    bias = distance(true, mapped)
    assert left < 0.006
    assert bias <= ambiguous + left
    if biased:
        assert ambiguous > 0.01
        assert bias > left / 2 + 0.003
        # shared out as these texts go on, nothing of it is left
        split = shared_out(chain["start"], table, joint, teacher, student)
        assert distance(true, split) <= left / 2 + 1e-3 < bias
    else:
        assert ambiguous == 0
        assert bias <= left / 2 + 1e-9  # nothing but the texts that were not enumerated


def test_the_next_token_has_its_probability_where_the_teacher_spells_it(
    folder: Path, tmp_path: Path
) -> None:
    """It is that of the chunk; what is left of the teacher's first token is shared out."""
    teacher, student = loaded(folder / "teacher"), loaded(folder / "added")
    size = teacher.get_vocab_size()
    whole = Capture(head=size, tail=0)
    old = text_store(tmp_path / "old", folder / "teacher", ["a unlikely un", "th unlikely"], whole)
    retokenize(str(tmp_path / "old"), str(tmp_path / "new"), folder / "added")
    new = everything(tmp_path / "new")
    un, unlikely = student.token_to_id("Ġun"), student.token_to_id("Ġunlikely")
    spelled = np.flatnonzero(labels(new.sequences) == unlikely)
    assert len(spelled) == 2
    for row in spelled.tolist():
        head = dict(
            zip(new.targets.head_ids[row].tolist(), new.targets.head_logprobs[row], strict=True)
        )
        assert head[unlikely] == pytest.approx(new.targets.label_logprob[row], abs=1e-5)
        [place] = [at for at, other in matched(old, new, teacher, student) if other == row]
        ids = old.targets.head_ids[place].tolist()
        first = old.targets.head_logprobs[place][ids.index(teacher.token_to_id("Ġun"))]
        both = math.exp(head[un]) + math.exp(head[unlikely])
        assert both == pytest.approx(math.exp(first), rel=1e-4)


def test_the_probability_of_ambiguous_tokens_can_stay_in_the_bucket(
    stores: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    made = {}
    policies: tuple[Ambiguous, ...] = ("map", "bucket")
    for ambiguous in policies:
        new = tmp_path / ambiguous
        manifest = retokenize(
            stores("head"), str(new), folder / "added",
            Decisions(ambiguous=ambiguous),
        )  # fmt: skip
        assert not list(verify(str(new)))
        made[ambiguous] = everything(new)
        assert manifest.retokenized is not None
        mass = manifest.retokenized.ambiguous_mass
        assert mass > 0
        assert sum(manifest.retokenized.ambiguous_bins) == manifest.retokenized.positions
    begins = made["map"].targets.chunk_sizes[:, 0] > 0
    more = np.exp(made["bucket"].targets.log_tail) - np.exp(made["map"].targets.log_tail)
    assert abs(float(more[begins].sum()) - mass) < 1e-4
    student = loaded(folder / "added")
    head = made["bucket"].targets.head_ids[begins]
    known = made["bucket"].targets.head_logprobs[begins] > -60
    assert not (known & (head == student.token_to_id("Ġun"))).any()
    assert (made["map"].targets.head_ids[begins] == student.token_to_id("Ġun")).any()


@pytest.mark.parametrize("split", ["split", "map"])
@pytest.mark.parametrize(("head", "tail"), [(1, 2), (4, 4), (0, 5), (6, 0), (14, 2)])
def test_probability_that_the_student_cannot_spell_is_left_out_of_whole_records(
    tmp_path: Path, head: int, tail: int, split: Ambiguous
) -> None:
    """With samples the rest of a record counts for all of it; without, the bucket keeps it."""
    texts = ["abc ab", "a bca c", "cc abcab a", "ab", "b abc abc c"] * 4
    teacher = saved(
        tmp_path / "t", byte_pairs([("a", "b"), ("ab", "c"), ("Ġ", "abc")], alphabet="abctuvwxyzĠ")
    )
    student = saved(tmp_path / "s", byte_pairs([("b", "c"), ("Ġ", "a")], alphabet="abcĠ"))
    capture = Capture(head=head, tail=tail)
    old = text_store(tmp_path / "old", teacher, texts, capture)
    decisions = Decisions(ambiguous=split)
    manifest = retokenize(str(tmp_path / "old"), str(tmp_path / "new"), student, decisions)
    made = manifest.retokenized
    assert made is not None
    assert made.unmapped_mass > 1.0
    assert not list(verify(str(tmp_path / "new")))
    new = everything(tmp_path / "new")
    pairs = [
        (ours, theirs)
        for ours, theirs in matched(old, new, loaded(teacher), loaded(student))
        if new.targets.chunk_sizes[theirs, 0] > 0
    ]
    assert len(pairs) > 10
    table = map_tokens(Speller(teacher, "t"), Speller(student, "s"), {})
    lost = kept_samples = 0
    for ours, theirs in pairs:
        one, other = old.targets.take(np.array([ours])), new.targets.take(np.array([theirs]))
        gone = table.first_V[one.head_ids[0]] < 0
        spelled = not (table.first_V[one.tail.ids] < 0).any()
        lost += bool(gone.any())
        kept_samples += bool(gone.any() and spelled)
        mass = np.exp(other.head_logprobs.astype(np.float64)).sum() + np.exp(other.log_tail[0])
        assert mass == pytest.approx(1.0, abs=1e-5)
        if not tail:
            bucket = np.exp(one.log_tail[0]) + np.exp(one.head_logprobs[0][gone]).sum()
            assert np.exp(other.log_tail[0]) >= bucket - 1e-5
    assert not head or lost
    assert not (head and tail) or kept_samples
