"""`coldstill.StoreWriter`: stores from targets of any origin."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import coldstill
import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.verify import verify
from coldstill.data.schema import Block, Capture, Targets
from oracles import (
    FULL,
    LENGTH,
    VOCABULARY,
    assert_same,
    draws,
    everything,
    known_draws,
    random_block,
)
from refusals import refusal

if TYPE_CHECKING:
    from pathlib import Path

HEAD = Capture(head=2, tail=0)


def writer(path: Path, capture: Capture, **settings: Any) -> coldstill.StoreWriter:
    defaults: dict[str, Any] = {
        "teacher": "ORG/teacher",
        "capture": capture,
        "sequence_length": LENGTH,
        "vocabulary": VOCABULARY,
        "codec": "plain",
    }
    return coldstill.StoreWriter(path, **(defaults | settings))


def arguments(block: Block, row: int, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What `add` takes for one sequence of a block."""
    one = block.take(np.array([row]))
    fields = {name: getattr(one.targets, name) for name in Targets.__dataclass_fields__}
    del fields["chunk_sizes"]  # of stores with a student's tokens
    tail = fields.pop("tail")
    fields["tail_ids"] = draws(tail)
    if tail.logprobs is not None:
        fields["tail_logprobs"] = known_draws(tail)
    kept = {n: v for n, v in fields.items() if n not in without}
    sequences = one.sequences
    return kept | {
        "token_ids": sequences.tokens[0],
        "positions": sequences.positions[0],
        "document_starts": sequences.document_starts[0].tolist(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_added_sequences_are_read_and_pass_verify(codec: str, store: str, tmp_path: Path) -> None:
    """In three shards of several blocks; with the plain codec, every number is the same."""
    block = random_block(3, 11, FULL)
    settings = {"codec": codec, "store": store, "shard_tokens": 4 * LENGTH}
    with writer(tmp_path / "s", FULL, **settings) as new:
        for row in range(len(block)):
            values = arguments(block, row)
            new.add(**values | {"tail_ids": values["tail_ids"][:, ::-1].tolist(),
                                "tail_logprobs": values["tail_logprobs"][:, ::-1]})  # fmt: skip
    assert list(verify(str(tmp_path / "s"))) == []
    reader = coldstill.open_store(tmp_path / "s")
    assert len(reader) == len(new) == 11
    assert len(reader.done) == 3
    assert reader.manifest == new.manifest
    assert reader.manifest.packing.together
    found = everything(tmp_path / "s")
    assert found.sequences.hashes.tolist() == block.sequences.hashes.tolist()
    if codec == "plain":
        documents = replace(block.sequences, document_ids=found.sequences.document_ids)
        assert_same(found, replace(block, sequences=documents))
    else:
        np.testing.assert_array_equal(draws(found.targets.tail), draws(block.targets.tail))


def test_positions_and_numbers_that_were_left_out_follow_from_the_others(tmp_path: Path) -> None:
    """Head and tail mass exactly; label and entropy where they can be known, and bounds elsewhere.
    Positions are all but the last of each document."""
    block = random_block(3, 6, FULL)
    rest = ("log_tail", "label_logprob", "entropy")
    with writer(tmp_path / "a", FULL) as new:
        for row in range(len(block)):
            new.add(**arguments(block, row, without=rest))
    found, wanted = everything(tmp_path / "a").targets, block.targets
    np.testing.assert_allclose(found.log_tail, wanted.log_tail, atol=1e-5)
    labels_M = labels(block.sequences)[:, None]
    known = (wanted.head_ids == labels_M).any(1) | (draws(wanted.tail) == labels_M).any(1)
    assert 0 < known.sum() < len(known)
    np.testing.assert_allclose(found.label_logprob[known], wanted.label_logprob[known], atol=1e-6)
    even = wanted.log_tail - np.log(VOCABULARY - FULL.head)
    np.testing.assert_allclose(found.label_logprob[~known], even[~known], atol=1e-5)
    with writer(tmp_path / "b", HEAD) as new:
        logprobs = np.log([[0.5, 0.25]] * 3)
        new.add([1, 2, 3, 4, 5], head_ids=[[2, 3]] * 3, head_logprobs=logprobs,
                document_starts=[0, 3])  # fmt: skip
    made = everything(tmp_path / "b")
    assert made.sequences.positions[0].tolist() == [0, 1, 3]
    assert made.sequences.document_ids[0].tolist() == [0, 1]
    tail = np.exp(made.targets.log_tail.astype(np.float64))
    np.testing.assert_allclose(tail, 0.25, rtol=1e-6)
    expected = [np.log(0.5), np.log(0.25), np.log(0.25 / (VOCABULARY - 2))]
    np.testing.assert_allclose(made.targets.label_logprob, expected, rtol=1e-6)
    spread = -(0.5 * np.log(0.5) + 0.25 * np.log(0.25) + 0.25 * np.log(0.25 / (VOCABULARY - 2)))
    np.testing.assert_allclose(made.targets.entropy, spread, rtol=1e-6)
    assert list(verify(str(tmp_path / "a"))) == list(verify(str(tmp_path / "b"))) == []


GOOD: dict[str, Any] = {
    "token_ids": [1, 2, 3],
    "head_ids": [[2, 1], [3, 1]],
    "head_logprobs": np.log([[0.6, 0.3], [0.5, 0.4]]),
}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "shape": ({"head_ids": [[2, 1]]}, "sequence 1: head_ids has shape (1, 2), expected (2, 2)"),
    "dtype": ({"head_ids": [[2.0, 1.0]] * 2}, "head_ids: has dtype float64, expected whole"),
    "ragged": ({"head_ids": [[2], [1, 3]]}, "head_ids: "),
    "large": ({"token_ids": [1, 2, 2**40]}, "token_ids: holds numbers beyond 32 bits"),
    "token": ({"token_ids": [1, 2, 40]}, "token ids outside the vocabulary of 40"),
    "id": ({"head_ids": [[2, 1], [3, 40]]}, "position 1: head ids outside the vocabulary"),
    "above 0": ({"head_logprobs": [[0.1, -3.0]] * 2}, "position 0: head log-probabilities above 0"),
    "mass": ({"head_logprobs": np.log([[0.6, 0.6]] * 2)}, "head and tail that do not sum to 1"),
    "unsorted": ({"head_logprobs": np.log([[0.3, 0.6]] * 2)}, "log-probabilities that increase"),
    "repeated": ({"head_ids": [[2, 2], [3, 1]]}, "position 0: head ids that repeat"),
    "nan": ({"head_logprobs": [[np.nan, -3.0]] * 2}, "position 0: head log-probabilities above 0"),
    "long": ({"token_ids": [1] * 13, "positions": [0, 1]}, "more than 12"),
    "positions": ({"positions": [1, 2]}, "positions from 1 to 2: expected 0 to 1"),
    "order": ({"positions": [1, 0]}, "supervised positions do not increase"),
    "starts": ({"document_starts": [0, 3]}, "document_starts [0, 3]: expected positions from 0"),
    "first": ({"document_starts": [1]}, "document_starts [1]: the first must be 0"),
    "absent": ({"head_logprobs": None}, "head_logprobs is missing; the capture has head = 2"),
    "unkept": ({"tail_logprobs": [[-1.0]] * 2}, "tail_logprobs was passed, but the capture does"),
}  # fmt: skip


def write(folder: Path, *sequences: dict[str, Any]) -> None:
    with writer(folder, HEAD, shard_tokens=1) as new:
        for each in sequences:
            new.add(**each)


@pytest.mark.slow
def test_a_wrong_argument_is_one_line_and_leaves_no_store(tmp_path: Path) -> None:
    for name, (changed, expected) in WRONG.items():
        folder = tmp_path / name
        message = refusal(write, folder, GOOD, GOOD | changed)
        assert expected in message, name
        assert message.startswith(f"{folder}: sequence 1"), name
        assert "not a store" in refusal(coldstill.open_store, folder, incomplete=True)
        write(folder, GOOD)  # the folder is free again
        assert len(coldstill.open_store(folder)) == 1


def test_samples_give_the_entropy_outside_the_head_or_nothing(tmp_path: Path) -> None:
    capture = Capture(head=2, tail=500, tail_logprobs=True)
    p_V = np.sort(np.random.default_rng(0).dirichlet(np.full(VOCABULARY, 0.3)))[::-1]
    ends_V = np.cumsum(p_V[2:]) / p_V[2:].sum()
    ids_R = 2 + np.searchsorted(ends_V, (np.arange(500) + 0.5) / 500)
    head: dict[str, Any] = {"head_ids": [[0, 1]], "head_logprobs": np.log([p_V[:2]])}
    with writer(tmp_path / "a", capture) as new:
        new.add([0, 1], **head, tail_ids=[ids_R], tail_logprobs=np.log([p_V[ids_R]]))
    exact = -(p_V * np.log(p_V)).sum()
    assert everything(tmp_path / "a").targets.entropy[0] == pytest.approx(exact, abs=0.02)
    samples: dict[str, Any] = {"token_ids": [1, 2, 3], "tail_ids": [[5, 2], [9, 9]]}
    with writer(tmp_path / "b", Capture(head=0, tail=2)) as new:
        assert "entropy is missing" in refusal(new.add, **samples)
        new.add(**samples, label_logprob=[-1.0, -2.0], entropy=[1.0, 2.0])
    assert draws(everything(tmp_path / "b").targets.tail).tolist() == [[2, 5], [9, 9]]
    assert list(verify(str(tmp_path / "b"))) == []


def test_an_impossible_store_is_refused_before_anything_is_written(
    tmp_path: Path, tokenizer: Any
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vocabulary": None}, "pass a tokenizer, or vocabulary"),
        ({"vocabulary": 1}, "capture.head: 2 tokens, not 0 to 1"),
        ({"sequence_length": 0}, "sequence_length = 0: expected a whole number above 0"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"shard_tokens": "1"}, "shard_tokens = '1': expected a whole number above 0"),
        ({"capture": {"head": 2}}, "capture = {'head': 2}: expected coldstill.Capture"),
        ({"codec": "none"}, "'none' is not known"),
        ({"tokenizer": tmp_path}, "tokenizer.json: cannot be read as a tokenizer"),
        ({"tokenizer": tokenizer}, "but the tokenizer has"),
    ]
    for settings, message in cases:
        assert message in refusal(writer, tmp_path / "x", **{"capture": HEAD} | settings)
    assert "not open" in refusal(writer(tmp_path / "x", HEAD).add, **GOOD)
    assert not (tmp_path / "x").exists()
    assert "no sequence was added" in refusal(write, tmp_path / "x")
    write(tmp_path / "x", GOOD)
    assert "already holds a store" in refusal(write, tmp_path / "x", GOOD)


def test_a_tokenizer_is_copied_and_gives_the_vocabulary(
    tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    manifests = []
    for name, given in (("folder", tokenizer_folder), ("object", tokenizer)):
        with writer(tmp_path / name, HEAD, tokenizer=given, vocabulary=None) as new:
            new.add(**GOOD)
        assert list(verify(str(tmp_path / name))) == []
        assert (tmp_path / name / "tokenizer/tokenizer.json").is_file()
        manifests.append(new.manifest.tokenizer)
    assert manifests[0] == manifests[1]
    assert manifests[0].size == len(tokenizer)
