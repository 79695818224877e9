"""What every codec promises; a new one inherits `CodecTests` and states its error."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from coldstill.data.codecs import CODECS, distortion, largest_error, measure
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Block, Capture, Tail, Targets
from oracles import (
    CAPTURES,
    VOCABULARY,
    draws,
    known_draws,
    numbers,
    random_block,
    random_record,
    with_targets,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstill.data.codecs import Codec
    from numpy.typing import NDArray

captures = pytest.mark.parametrize("capture", CAPTURES.values(), ids=list(CAPTURES))


CERTAIN = [[0.0, -103.0]]


def record(head_logprobs: Any, log_tail: Any) -> tuple[Targets, Capture]:
    """One position with two tokens and two samples."""
    targets = Targets(
        head_ids=np.array([[5, 3]], np.int32),
        head_logprobs=np.array(head_logprobs, np.float32),
        log_tail=np.array(log_tail, np.float32),
        tail=Tail.from_draws(np.array([[7, 7]], np.int32), np.full((1, 2), -111.0, np.float32)),
        label_logprob=np.array([-111.0], np.float32),
        entropy=np.array([0.0], np.float32),
        log_norm=np.zeros((1, 0), np.float32),
    )
    return targets, Capture(head=2, tail=2, tail_logprobs=True)


class CodecTests:
    """The subclass names the codec and the largest error of what is beside the head."""

    name: ClassVar[str]
    stated_error: ClassVar[Mapping[str, float]] = {}
    """Of tail, log of sin: in sqrt(p); of the rest: in the value itself. 0 is exact."""

    def codec(self, capture: Capture, vocabulary: int = VOCABULARY, **settings: Any) -> Codec:
        return CODECS[self.name].fitting(vocabulary=vocabulary, capture=capture, **settings)

    def round_trip(self, block: Block, vocabulary: int = VOCABULARY) -> Block:
        codec = self.codec(block.capture, vocabulary)
        return codec.decode(codec.encode(block), block.capture)

    def check(self, found: Block, wanted: Block) -> None:
        np.testing.assert_equal(numbers(found.sequences), numbers(wanted.sequences))
        self.check_targets(found.targets, wanted.targets, wanted.capture)

    def check_targets(self, found: Targets, wanted: Targets, capture: Capture) -> None:
        for f in fields(Targets):
            one, other = getattr(found, f.name), getattr(wanted, f.name)
            if f.name != "tail":
                assert (one.shape, one.dtype) == (other.shape, other.dtype), f.name
        order, expected = np.argsort(found.head_ids, 1), np.argsort(wanted.head_ids, 1)
        assert np.array_equal(rows(found.head_ids, order), rows(wanted.head_ids, expected))
        assert np.array_equal(draws(found.tail), draws(wanted.tail))
        assert (found.tail.counts >= 1).all()
        assert np.array_equal(found.tail.lengths, wanted.tail.lengths)
        assert (found.tail.logprobs is None) is (wanted.tail.logprobs is None)
        if wanted.tail.logprobs is not None:
            self.close("tail_logprobs", known_draws(found.tail), known_draws(wanted.tail))
        assert np.array_equal(found.head_ids[:, :1], wanted.head_ids[:, :1])
        assert not np.isnan(found.head_logprobs).any()
        assert (np.diff(found.head_logprobs, axis=1) <= 0).all()
        assert largest_error(wanted, found) <= self.codec(capture).maximum_error(capture) + 1e-7
        mass = np.exp(found.head_logprobs.astype(float)).sum(1) + np.exp(found.log_tail)
        assert mass.max(initial=0.0) <= 1 + 2e-6
        assert np.array_equal(found.log_tail == -np.inf, wanted.log_tail == -np.inf)
        for field in ("log_tail", "label_logprob", "entropy", "log_norm"):
            self.close(field, getattr(found, field), getattr(wanted, field))

    def close(self, field: str, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        error = self.stated_error.get(field, 0.0)
        if error == 0.0:
            assert np.array_equal(found, wanted), field
            return
        if field == "log_tail":
            found, wanted = np.exp(found / 2), np.exp(wanted / 2)
        difference = found.astype(float) - wanted.astype(float)
        assert np.abs(difference).max(initial=0.0) <= error, field

    @captures
    def test_ids_are_exact_and_numbers_within_the_stated_error(self, capture: Capture) -> None:
        """Every column has a row a sequence and a plain type."""
        for seed in range(5):
            block = random_block(seed, 9, capture)
            self.check(self.round_trip(block), block)
        for count in (0, 1):
            targets = random_block(0, 9, capture).targets.take(np.arange(count))
            block = with_targets(targets, capture)
            found = self.round_trip(block)
            assert len(found.targets) == count
            self.check(found, block)
        for name, column in self.codec(capture).encode(random_block(0, 9, capture)).items():
            assert len(column) == 9, name
            array = column.values if isinstance(column, Ragged) else column
            assert array.dtype.kind in "iuf", name
            assert array.ndim <= 2, name
            assert 0 not in array.shape[1:], name

    def test_sequences_without_positions_keep_their_place(self) -> None:
        block = random_block(3, 12)
        lengths = block.sequences.positions.lengths
        for rows_ in ([], [int(np.argmin(lengths))], [0, int(np.argmin(lengths)), 1]):
            part = block.take(np.array(rows_, np.int64))
            self.check(self.round_trip(part), part)

    @pytest.mark.parametrize("border", [256, 65_536, 131_072, 2**18, 2**20])
    def test_ids_up_to_the_last_one_of_any_vocabulary_are_exact(self, border: int) -> None:
        for vocabulary in (border - 1, border, min(border + 1, 2**20)):
            for head, tail in ((5, 4), (1, 0), (0, 1)):
                capture = Capture(head=head, tail=tail)
                targets = random_record(vocabulary, 20, capture)
                block = with_targets(targets, capture)
                self.check_targets(self.round_trip(block, vocabulary).targets, targets, capture)

    @pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 30.0])
    def test_flat_and_peaked_heads_of_any_size_stay_within_the_error(self, spread: float) -> None:
        for head in (1, 2, 50, 300):
            capture = Capture(head=head, tail=3)
            targets = random_record(50_000, 200, capture, spread=spread)
            found = self.round_trip(with_targets(targets, capture), 50_000).targets
            self.check_targets(found, targets, capture)

    def test_encoding_is_deterministic_and_leaves_the_block_alone(self) -> None:
        capture = CAPTURES["temperatures"]
        block, twin = (random_block(0, 9, capture) for _ in range(2))
        codec = self.codec(capture)
        once, again = (as_bytes(codec.encode(block)) for _ in range(2))
        assert once == again
        for f in fields(Targets):
            if f.name != "tail":
                one, other = getattr(block.targets, f.name), getattr(twin.targets, f.name)
                assert np.array_equal(one, other), f.name
        assert np.array_equal(block.targets.tail.ids, twin.targets.tail.ids)

    def test_extreme_probabilities_stay_finite(self) -> None:
        flat, half = [[-0.9328, -0.9328]], [[-0.6931472, -0.6931472]]
        for head, tail in (
            (CERTAIN, -110.0),
            (CERTAIN, -np.inf),
            (flat, -1.5464),
            ([[-16.0, -16.0]], -2.3e-7),  # all is in the tail
            ([[-90.0, -90.5]], 0.0),
            (half, -np.inf),
        ):
            targets, capture = record(head_logprobs=head, log_tail=[tail])
            found = self.round_trip(with_targets(targets, capture)).targets
            self.check_targets(found, targets, capture)
            assert np.isfinite(found.head_logprobs).all()

    def test_columns_of_another_capture_or_too_few_are_refused(self) -> None:
        capture = Capture(head=4, tail=3)
        codec = self.codec(capture)
        columns = codec.encode(random_block(0, 5, capture))
        for changed in ({"head": 9}, {"tail": 9}, {"temperatures": (2.0, 3.0)}):
            with pytest.raises((ValueError, KeyError), match="column"):
                codec.decode(columns, replace(capture, **changed))
        block = random_block(0, 5)
        codec = self.codec(block.capture)
        columns = codec.encode(block)
        for name in columns:
            fewer = {n: c for n, c in columns.items() if n != name}
            with pytest.raises((ValueError, KeyError), match=name):
                codec.decode(fewer, block.capture)


def rows(array_MK: NDArray[Any], order_MK: NDArray[Any]) -> NDArray[Any]:
    taken: NDArray[Any] = np.take_along_axis(array_MK, order_MK, axis=1)
    return taken


def as_bytes(columns: Mapping[str, Any]) -> dict[str, tuple[bytes, bytes]]:
    return {
        name: (c.values.tobytes(), c.offsets.tobytes())
        if isinstance(c, Ragged)
        else (b"", c.tobytes())
        for name, c in columns.items()
    }


class TestPlain(CodecTests):
    name = "plain"

    def test_columns_have_plain_types_and_decoding_copies_nothing(self) -> None:
        block = random_block(0, 5)
        codec = self.codec(block.capture)
        columns: Any = codec.encode(block)
        kinds = {n: str(c.values.dtype) for n, c in columns.items() if isinstance(c, Ragged)}
        whole = ("token_ids", "document_starts", "positions", "head_ids", "tail_ids",
                 "tail_sizes", "tail_counts")  # fmt: skip
        reals = ("head_logprobs", "tail_logprobs", "label_logprob", "entropy", "log_norm")
        expected = dict.fromkeys(whole, "int32") | dict.fromkeys((*reals, "log_tail"), "float32")
        assert kinds == expected | {"document_ids": "int64"}
        found = codec.decode(columns, block.capture)
        assert np.shares_memory(found.targets.head_logprobs, columns["head_logprobs"].values)
        entropy = columns["entropy"]
        columns["entropy"] = Ragged(entropy.values.astype(np.float64), entropy.offsets)
        with pytest.raises(ValueError, match="'entropy' should be float32"):
            codec.decode(columns, block.capture)


class TestCompact(CodecTests):
    name = "compact"
    # half a step of an angle; half a 64th of a nat, and float32's own rounding of it
    stated_error: ClassVar[Mapping[str, float]] = {
        "log_tail": np.pi / 4 / 4095 + 4e-4,
        "tail_logprobs": 0.0079,
        "label_logprob": 0.0079,
        "entropy": 0.0079,
    }

    @pytest.mark.parametrize("levels", [15, 64, 127, 254])
    def test_more_levels_cost_less_and_the_head_always_has_its_mass(self, levels: int) -> None:
        capture = Capture(head=50, tail=0)
        targets = random_record(4096, 500, capture, spread=2.0)
        codec = self.codec(capture, 4096, levels=levels)
        block = with_targets(targets, capture)
        found = codec.decode(codec.encode(block), capture)
        error = measure(block, found, codec.maximum_error(capture))
        assert error.measured <= error.maximum
        # KL is twice the squared error of sqrt(p); each of 50 is off by a step's variance at most
        assert 0 < error.kl < 2 * 50 / levels**2 / 12 * 1.5
        mass = np.exp(found.targets.head_logprobs.astype(float)).sum(1)
        assert np.allclose(mass, 1 - np.exp(found.targets.log_tail.astype(float)), atol=1e-6)

    def test_a_wide_flat_head_on_few_levels_has_its_mass(self) -> None:
        # rounded up, its weights add up to several times 1
        capture = Capture(head=899, tail=0)
        record = random_record(4096, 3, capture, spread=1e-6)
        ids = np.tile(np.arange(899, dtype=np.int32), (3, 1))
        block = with_targets(replace(record, head_ids=ids), capture)
        codec = self.codec(capture, 4096, levels=15)
        found = codec.decode(codec.encode(block), capture).targets
        mass = np.exp(found.head_logprobs.astype(float)).sum(1)
        assert np.allclose(mass, 1 - np.exp(found.log_tail.astype(float)), atol=1e-5)

    def test_a_level_beyond_the_last_is_refused(self) -> None:
        capture = Capture(head=4, tail=0)
        codec = self.codec(capture, 64, levels=15)
        columns = codec.encode(with_targets(random_record(64, 5, capture), capture))
        levels = columns["head_levels"]
        assert isinstance(levels, Ragged)
        levels.values[2, 1] = 17
        with pytest.raises(ValueError, match="'head_levels' reaches 17"):
            codec.decode(columns, capture)

    def test_the_error_is_nearly_the_same_for_every_temperature(self) -> None:
        capture = Capture(head=30, tail=0, temperatures=(4.0,))
        targets = random_record(4096, 500, capture, spread=3.0)
        targets = replace(targets, log_norm=np.zeros((500, 1), np.float32))
        block = with_targets(targets, capture)
        found = self.round_trip(block, 4096).targets

        def tempered(t: Targets) -> NDArray[Any]:
            order = np.argsort(t.head_ids, 1)
            p = np.exp(rows(t.head_logprobs, order).astype(float) / 4.0)
            share: NDArray[Any] = p / p.sum(1, keepdims=True)
            return share

        p, q = tempered(targets), tempered(found)
        kl = (p * np.log(p / q)).sum(1).mean()
        assert kl < 2e-3
        # steps of sqrt(p) alone would lose the small ones, which count at a temperature of 4
        coarse = CODECS["compact"](vocabulary=4096)  # type: ignore[call-arg]
        q = tempered(coarse.decode(coarse.encode(block), capture).targets)
        assert (p * np.log(p / q)).sum(1).mean() > 10 * kl

    def test_a_tie_is_broken_in_favour_of_the_most_probable(self) -> None:
        targets, capture = record(
            head_logprobs=[[np.log(0.3001), np.log(0.3)]], log_tail=[np.log(0.3999)]
        )
        found = self.round_trip(with_targets(targets, capture)).targets
        assert found.head_ids.tolist() == [[5, 3]]
        assert found.head_logprobs[0, 0] > found.head_logprobs[0, 1]

    def test_ids_of_small_vocabularies_take_two_bytes(self) -> None:
        for vocabulary, dtype in ((65_536, "uint16"), (65_537, "uint32")):
            capture = Capture(head=3, tail=2)
            block = with_targets(random_record(vocabulary, 5, capture), capture)
            columns: Any = self.codec(capture, vocabulary).encode(block)
            assert columns["token_ids"].values.dtype == dtype

    def test_damaged_columns_are_refused(self) -> None:
        block = random_block(0, 5, Capture(head=4, tail=2))
        codec = self.codec(block.capture)
        for name, value in (("tail_angle", 5000), ("tail_angle", 4095), ("run_lengths", 0)):
            columns: Any = codec.encode(block)
            columns[name].values[-1] = value
            with pytest.raises(ValueError, match=name.split("_")[0]):
                codec.decode(columns, block.capture)


def test_every_codec_has_its_tests() -> None:
    assert {tests.name for tests in CodecTests.__subclasses__()} == set(CODECS)


def test_distortion_is_that_of_a_loop() -> None:
    capture = Capture(head=4, tail=2)
    block = random_block(1, 6, capture)
    codec = CODECS["compact"].fitting(vocabulary=VOCABULARY, capture=capture, levels=20)
    found, wanted = codec.decode(codec.encode(block), capture).targets, block.targets
    for m, value in enumerate(distortion(wanted, found)):
        order = [found.head_ids[m].tolist().index(i) for i in wanted.head_ids[m].tolist()]
        kl = np.exp(float(wanted.log_tail[m])) * float(wanted.log_tail[m] - found.log_tail[m])
        for place, logprob in zip(order, wanted.head_logprobs[m].tolist(), strict=True):
            kl += np.exp(logprob) * (logprob - float(found.head_logprobs[m, place]))
        assert value == pytest.approx(max(kl, 0.0), abs=1e-7)
    assert distortion(wanted, wanted).max() == 0.0


def test_a_changed_id_is_named_by_its_position() -> None:
    targets = random_block(1, 6, Capture(head=4, tail=2)).targets
    head_ids, tail_ids = targets.head_ids.copy(), draws(targets.tail)
    for ids in (head_ids, tail_ids):
        ids[3, 1] = 39 if ids[3, 1] != 39 else 38
    for changed in (
        replace(targets, head_ids=head_ids),
        replace(targets, tail=Tail.from_draws(tail_ids)),
    ):
        with pytest.raises(ValueError, match=r"the codec changes the .* of position 3"):
            distortion(targets, changed)


def test_tokens_that_occur_together_get_ranks_side_by_side() -> None:
    """Records of a few topics, whose tokens are anywhere in the vocabulary."""
    random = np.random.default_rng(0)
    vocabulary, capture = 6_000, Capture(head=0, tail=50)
    topics = random.permutation(vocabulary)[:2_400].reshape(12, 200)

    def block(seed: int) -> Block:
        own = np.random.default_rng(seed)
        ids = np.stack([own.choice(topics[own.integers(12)], 50) for _ in range(800)])
        targets = replace(random_record(vocabulary, 800, capture), tail=Tail.from_draws(ids))
        return with_targets(targets, capture)

    plain = CODECS["compact"].fitting(vocabulary=vocabulary, capture=capture)
    codec: Any = plain.learned(block(1))
    again: Any = plain.learned(block(1))
    assert codec.frequent == again.frequent
    assert codec.learned(block(2)) == codec  # what is given stays
    order = np.array(codec.frequent)
    assert len(set(codec.frequent)) == len(order) == 2_400
    topic_V = np.full(vocabulary, -1)
    topic_V[topics] = np.arange(12)[:, None]
    alike = np.diff(topic_V[order[16:]]) == 0
    assert alike.mean() > 0.9  # a twelfth would be chance
    other = block(2)
    for one in (plain, codec):
        found = one.decode(one.encode(other), capture)
        assert np.array_equal(draws(found.targets.tail), draws(other.targets.tail))

    def classes(columns: Any) -> float:
        symbols = np.concatenate([columns[f"tail_ids_{i}"].values for i in range(4)]) & 127
        shares = np.bincount(symbols) / len(symbols)
        further = len(columns["tail_ids_low"].values) / len(symbols)
        return float(-(shares * np.log2(np.maximum(shares, 1e-9))).sum() / 8 + further)

    by_frequency = replace(codec, frequent=tuple(sorted(codec.frequent)))
    assert classes(codec.encode(other)) < 0.8 * classes(by_frequency.encode(other))


def test_a_block_without_records_or_with_one_token_is_ordered() -> None:
    for capture in (Capture(head=0, tail=0), Capture(head=1, tail=1), Capture(head=0, tail=2)):
        for count in (0, 1, 2):
            targets = random_record(2, 3, capture).take(np.arange(count))
            codec: Any = CODECS["compact"].fitting(vocabulary=2, capture=capture)
            order = codec.learned(with_targets(targets, capture)).frequent
            assert set(order) <= {0, 1}
            assert len(order) >= 1
