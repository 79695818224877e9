"""What every codec promises; a new one inherits `CodecTests` and states its error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from coldstill.data.codecs import CODECS
from coldstill.data.schema import Capture, Targets
from oracles import VOCABULARY, random_block

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

CAPTURES = {
    "head and tail": Capture(head=4, tail=3),
    "one of each": Capture(head=1, tail=1),
    "head only": Capture(head=5, tail=0),
    "tail only": Capture(head=0, tail=6),
    "neither": Capture(head=0, tail=0),
    "whole vocabulary": Capture(head=VOCABULARY, tail=0),
    "tail log-probabilities": Capture(head=2, tail=3, tail_logprobs=True),
    "temperatures": Capture(head=3, tail=2, temperatures=(0.5, 2.0, 4.0)),
    "temperatures without a tail": Capture(head=3, tail=0, temperatures=(2.0,)),
}
PROBABILITIES = ("head_logprobs", "tail_logprobs", "log_tail", "label_logprob")


class CodecTests:
    """The subclass names the codec and the largest error it states, by field."""

    name: ClassVar[str]
    stated_error: ClassVar[Mapping[str, float]] = {}
    """Of a log-probability: the largest difference in sqrt(p); of the rest: in the value itself."""

    def round_trip(self, targets: Targets, capture: Capture) -> Targets:
        codec = CODECS[self.name]()
        return codec.decode(codec.encode(targets), capture)

    def check(self, found: Targets, wanted: Targets) -> None:
        order, expected = np.argsort(found.head_ids, 1), np.argsort(wanted.head_ids, 1)
        assert np.array_equal(rows(found.head_ids, order), rows(wanted.head_ids, expected))
        assert np.array_equal(found.tail_ids, wanted.tail_ids)
        assert (np.diff(found.head_logprobs, axis=1) <= 0).all()
        self.close(
            "head_logprobs", rows(found.head_logprobs, order), rows(wanted.head_logprobs, expected)
        )
        assert (found.tail_logprobs is None) is (wanted.tail_logprobs is None)
        for field in ("log_tail", "tail_logprobs", "label_logprob", "entropy", "log_norm"):
            if getattr(wanted, field) is not None:
                self.close(field, getattr(found, field), getattr(wanted, field))

    def close(self, field: str, found: NDArray[Any], wanted: NDArray[Any]) -> None:
        assert found.shape == wanted.shape, field
        assert found.dtype == wanted.dtype, field
        error = self.stated_error.get(field, 0.0)
        if error == 0.0:
            assert np.array_equal(found, wanted), field
        elif field in PROBABILITIES:
            difference = np.exp(found.astype(float) / 2) - np.exp(wanted.astype(float) / 2)
            assert np.abs(difference).max(initial=0.0) <= error, field
        else:
            difference = found.astype(float) - wanted.astype(float)
            assert np.abs(difference).max(initial=0.0) <= error, field

    @pytest.mark.parametrize("capture", CAPTURES.values(), ids=list(CAPTURES))
    def test_ids_are_exact_and_numbers_within_the_stated_error(self, capture: Capture) -> None:
        for seed in range(5):
            targets = random_block(seed, 9, capture).targets
            self.check(self.round_trip(targets, capture), targets)

    @pytest.mark.parametrize("capture", CAPTURES.values(), ids=list(CAPTURES))
    @pytest.mark.parametrize("count", [0, 1])
    def test_no_position_and_one_position_are_no_special_case(
        self, count: int, capture: Capture
    ) -> None:
        targets = random_block(0, 9, capture).targets.take(np.arange(count))
        found = self.round_trip(targets, capture)
        assert len(found) == count
        self.check(found, targets)

    @pytest.mark.parametrize("capture", CAPTURES.values(), ids=list(CAPTURES))
    def test_every_array_has_one_entry_per_position_and_a_plain_type(
        self, capture: Capture
    ) -> None:
        targets = random_block(0, 9, capture).targets
        for name, array in CODECS[self.name]().encode(targets).items():
            assert len(array) == len(targets), name
            assert array.dtype.kind in "iuf", name
            assert array.ndim <= 2, name
            assert 0 not in array.shape[1:], name

    def test_encoding_is_deterministic_and_leaves_the_targets_alone(self) -> None:
        capture = CAPTURES["temperatures"]
        targets, twin = (random_block(0, 9, capture).targets for _ in range(2))
        codec = CODECS[self.name]()
        once, again = codec.encode(targets), codec.encode(targets)
        assert {n: a.tobytes() for n, a in once.items()} == {
            n: a.tobytes() for n, a in again.items()
        }
        assert np.array_equal(targets.head_ids, twin.head_ids)
        assert np.array_equal(targets.head_logprobs, twin.head_logprobs)

    def test_certainty_and_next_to_nothing_survive(self) -> None:
        capture = Capture(head=2, tail=2, tail_logprobs=True)
        targets = Targets(
            head_ids=np.array([[5, 3]], np.int32),
            head_logprobs=np.array([[0.0, -103.0]], np.float32),
            log_tail=np.array([-110.0], np.float32),
            tail_ids=np.array([[7, 7]], np.int32),
            tail_logprobs=np.array([[-111.0, -111.0]], np.float32),
            label_logprob=np.array([-111.0], np.float32),
            entropy=np.array([0.0], np.float32),
            log_norm=np.zeros((1, 0), np.float32),
        )
        found = self.round_trip(targets, capture)
        self.check(found, targets)
        assert not np.isnan(found.head_logprobs).any()

    @pytest.mark.parametrize("changed", [{"head": 9}, {"tail": 9}, {"temperatures": (2.0, 3.0)}])
    def test_arrays_of_another_capture_are_refused(self, changed: dict[str, Any]) -> None:
        codec = CODECS[self.name]()
        arrays = codec.encode(random_block(0, 5, Capture(head=4, tail=3)).targets)
        with pytest.raises(ValueError, match="column"):
            codec.decode(arrays, Capture(**({"head": 4, "tail": 3} | changed)))


def rows(array_MK: NDArray[Any], order_MK: NDArray[Any]) -> NDArray[Any]:
    taken: NDArray[Any] = np.take_along_axis(array_MK, order_MK, axis=1)
    return taken


class TestPlain(CodecTests):
    name = "plain"

    def test_ids_are_int32_and_probabilities_float32(self) -> None:
        arrays = CODECS[self.name]().encode(random_block(0, 5).targets)
        kinds = {name: str(array.dtype) for name, array in arrays.items()}
        assert kinds == {
            "head_ids": "int32",
            "head_logprobs": "float32",
            "log_tail": "float32",
            "tail_ids": "int32",
            "tail_logprobs": "float32",
            "label_logprob": "float32",
            "entropy": "float32",
            "log_norm": "float32",
        }

    def test_decoding_copies_nothing(self) -> None:
        block = random_block(0, 5)
        codec = CODECS[self.name]()
        arrays = codec.encode(block.targets)
        found = codec.decode(arrays, block.capture)
        assert np.shares_memory(found.head_logprobs, arrays["head_logprobs"])

    def test_a_column_of_another_type_is_named(self) -> None:
        block = random_block(0, 5)
        codec = CODECS[self.name]()
        arrays = codec.encode(block.targets)
        arrays["entropy"] = arrays["entropy"].astype(np.float64)
        with pytest.raises(ValueError, match="'entropy' should be float32"):
            codec.decode(arrays, block.capture)
        del arrays["entropy"]
        with pytest.raises(ValueError, match=r"'entropy' should be float32 .*: nothing"):
            codec.decode(arrays, block.capture)


def test_every_codec_has_its_tests() -> None:
    assert {tests.name for tests in CodecTests.__subclasses__()} == set(CODECS)
