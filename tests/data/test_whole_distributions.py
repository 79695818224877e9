"""Whole distributions handed to `StoreWriter`: selection in numpy, and a writer that resumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import coldstill
import numpy as np
import pytest
import torch
from coldstill.data.alignment import labels
from coldstill.data.maintenance.verify import verify
from coldstill.data.order import uniform
from coldstill.data.schema import Capture
from coldstill.data.selection import select
from coldstill.stages.capture import selection
from oracles import everything
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

V, T = 300, 10
CAPTURES = {
    "head": Capture(head=6, tail=0),
    "tail": Capture(head=0, tail=20, tail_logprobs=True),
    "both": Capture(head=5, tail=11, temperatures=(0.5, 2.0)),
    "whole": Capture(head=V, tail=0),
}


def logprobs(rows: int, seed: int = 0) -> NDArray[np.float64]:
    logits = np.random.default_rng(seed).normal(size=(rows, V)) * 3
    made: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return made


@pytest.mark.parametrize("capture", CAPTURES)
def test_the_selection_is_that_of_stage_one(capture: str) -> None:
    """Head, samples, masses and norms equal those that torch selects with the same shifts."""
    wanted, dense = CAPTURES[capture], logprobs(40)
    random = np.random.default_rng(1)
    labels_M, shift_M = random.integers(0, V, 40), random.random(40)
    found = select(dense, labels_M, shift_M, wanted)
    [part] = selection.select(
        torch.tensor(dense, dtype=torch.float32), torch.tensor(labels_M), torch.tensor(shift_M),
        wanted,
    )  # fmt: skip
    np.testing.assert_array_equal(found.head_ids, part.head_ids.numpy())
    for name in ("head_logprobs", "log_tail", "label_logprob", "entropy", "log_norm"):
        expected = getattr(part, name).numpy()
        np.testing.assert_allclose(getattr(found, name), expected, atol=2e-4, err_msg=name)
    counts = np.zeros((2, 40, V))
    np.add.at(counts[0], (found.tail.rows(), found.tail.ids), found.tail.counts)
    rows = part.tail.rows().numpy()
    np.add.at(counts[1], (rows, part.tail.ids.numpy()), part.tail.counts.numpy())
    assert (counts[0] == counts[1]).mean() > 0.999  # a point on a border may fall on either side


def test_a_token_that_cannot_come_gets_what_is_missing_from_one() -> None:
    dense = np.full((2, V), -np.inf)
    dense[0, :4] = np.log([0.5, 0.3, 0.15, 0.04])  # 0.01 was taken away by a floor
    dense[1, 7] = 0.0
    found = select(dense, np.array([9, 7]), np.array([0.5, 0.5]), Capture(head=3, tail=4))
    np.testing.assert_allclose(np.exp(found.head_logprobs[0]), [0.5, 0.3, 0.15], rtol=1e-6)
    assert np.exp(found.log_tail[0]) == pytest.approx(0.05, rel=1e-6)
    assert np.exp(found.label_logprob[0]) == pytest.approx(0.01 / (V - 4), rel=1e-5)
    assert found.head_ids[1, 0] == 7
    assert np.isfinite(found.head_logprobs[1]).all()
    assert 0 < np.exp(found.log_tail[1]) < 2e-9


def write(path: Path, capture: Capture, stop: int | None = None, **settings: Any) -> None:
    """Twelve sequences in shards of two, up to an error before sequence `stop`."""
    with coldstill.StoreWriter(
        path, teacher="dense", capture=capture, sequence_length=T, vocabulary=V, codec="plain",
        shard_tokens=2 * T, **settings,
    ) as new:  # fmt: skip
        for number in range(len(new), 12):
            if number == stop:
                raise KeyboardInterrupt
            tokens = np.random.default_rng(number).integers(0, V, T)
            new.add(tokens, logprobs=logprobs(T - 1, number))


def test_what_the_impossible_tokens_cannot_hold_is_shared_by_all() -> None:
    """One token without probability is at most as probable as the least probable other one, and
    0.9 % are missing: head and tail sum to 1 all the same."""
    dense = logprobs(20) + np.log(0.991)
    dense[:, 7] = -np.inf
    shift_M = np.full(20, 0.5)
    for capture in CAPTURES.values():
        found = select(dense, np.full(20, 9), shift_M, capture)
        sums_M = np.exp(found.head_logprobs.astype(float)).sum(1) + np.exp(found.log_tail)
        np.testing.assert_allclose(sums_M, 1.0, atol=1e-6)


def test_a_store_of_whole_distributions_passes_verification(tmp_path: Path) -> None:
    capture = CAPTURES["both"]
    write(tmp_path / "s", capture)
    assert list(verify(str(tmp_path / "s"))) == []
    block = everything(tmp_path / "s")
    dense = np.concatenate([logprobs(T - 1, number) for number in range(12)])
    own = labels(block.sequences)
    np.testing.assert_allclose(
        block.targets.label_logprob, dense[np.arange(len(own)), own], atol=1e-5
    )
    shift = uniform(0, np.repeat(np.arange(12), T - 1), block.sequences.positions.values)
    again = select(dense, own, shift, capture)
    np.testing.assert_array_equal(block.targets.tail.ids, again.tail.ids)


def test_an_interrupted_writer_continues_and_gives_the_same_bytes(tmp_path: Path) -> None:
    capture = CAPTURES["both"]
    write(tmp_path / "whole", capture, resume=True)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", capture, stop=7, resume=True)
    assert "not a store" in refusal(coldstill.open_store, tmp_path / "cut")
    message = refusal(write, tmp_path / "cut", CAPTURES["tail"], resume=True)
    assert "begun differently: capture.head: 5 in the store, 0 now" in message
    assert "part of one whose writer was killed" in refusal(write, tmp_path / "cut", capture)
    write(tmp_path / "cut", capture, resume=True)
    files = {p.relative_to(tmp_path / "whole"): p for p in (tmp_path / "whole").rglob("*.*")}
    assert len(files) >= 13
    for name, file in files.items():
        if file.is_file():
            assert (tmp_path / "cut" / name).read_bytes() == file.read_bytes(), name
    assert not (tmp_path / "cut/unfinished.json").exists()


def test_wrong_distributions_are_one_line(tmp_path: Path) -> None:
    good = logprobs(2)
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "shape": ({"logprobs": good[:, 1:]}, "logprobs has shape (2, 299), expected (2, 300)"),
        "sum": ({"logprobs": good - 1.0}, "logprobs sum to 0.367879 as probabilities, expected 1"),
        "nan": ({"logprobs": np.where(good < -9, np.nan, good)}, "above 0, or not a number"),
        "logits": ({"logprobs": good + 20}, "above 0, or not a number"),
        "both": ({"logprobs": good, "entropy": [1.0, 1.0]}, "entropy was passed beside logprobs"),
    }
    for name, (given, expected) in wrong.items():
        with coldstill.StoreWriter(
            tmp_path / name, teacher="x", capture=CAPTURES["head"], sequence_length=T, vocabulary=V
        ) as new:
            assert expected in refusal(new.add, [1, 2, 3], **given)
            new.add([1, 2, 3], logprobs=good)
