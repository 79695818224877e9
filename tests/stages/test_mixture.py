"""Stores of several teachers read side by side, and students that learn from them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.alignment import labels
from coldstill.data.errors import ColdstillError
from coldstill.data.places.cache import CacheSettings
from coldstill.data.schema import Block, Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.students.lesson import mixed_stores
from coldstill.stages.train_student import train_student
from coldstill.stages.training.batch import Batch, collate
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.objective import attach_objective, mixed_terms, terms_of
from conftest import VOCABULARY, make_model
from oracles import manifest_for, random_block, random_targets, write_missing
from small_runs import LENGTH, SmallCorpus, capture_store, save_teacher
from small_students import KilledError, expect_same_training, killed_at, student_job
from small_trainings import lines

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import Manifest
    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.job import StudentJob
    from coldstill.stages.training.chunked_loss import Term
    from distance import Distance

pytest_plugins = ("distance",)

SHARES = (0.7, 0.3)


def second_opinion(block: Block, capture: Capture, seed: int = 9) -> Block:
    """The same sequences with another teacher's targets."""
    targets = random_targets(seed, labels(block.sequences), capture)
    return Block(sequences=block.sequences, targets=targets, capture=capture)


def write(root: str | Path, block: Block, **changes: Any) -> StoreReader:
    """A store of this block; `changes` are of its manifest."""
    settings = {k: changes.pop(k) for k in ("shard_sequences", "codec") if k in changes}
    manifest = dataclasses.replace(manifest_for(block, **settings), **changes)
    write_missing(root, manifest, block)
    return open_store(root)


def test_rows_are_read_side_by_side_in_the_order_of_the_first(tmp_path: Path) -> None:
    """Though the other store has shards of another size, another codec and another record."""
    block = random_block(1, 23)
    other = second_opinion(block, Capture(head=6, tail=0))
    first = write(tmp_path / "a", block)
    second = write(tmp_path / "b", other, shard_sequences=7, codec="compact")
    dataset = StoreDataset(first, second)
    order = dataset.order(3, 1)
    assert order.tolist() == StoreDataset(first).order(3, 1).tolist()
    assert len(dataset) == 23
    for start in range(0, 23, 4):
        rows = order[start : start + 4]
        ours, found = dataset.__getitems__(rows.tolist())
        sequences, targets, theirs = ours.sequences, ours.targets, found.targets
        expected, wanted = block.take(rows), second.read(rows).targets
        np.testing.assert_array_equal(sequences.ids, expected.sequences.ids)
        np.testing.assert_array_equal(targets.head_ids, expected.targets.head_ids)
        np.testing.assert_array_equal(theirs.head_ids, wanted.head_ids)
        np.testing.assert_array_equal(theirs.head_logprobs, wanted.head_logprobs)
        np.testing.assert_array_equal(  # equal probabilities may come in another order
            np.sort(theirs.head_ids), np.sort(other.take(rows).targets.head_ids)
        )
    one = dataset[5]
    assert one[0].sequences.ids.tolist() == [5]
    assert len(one[1].targets) == len(block.sequences.positions[5])


@pytest.mark.parametrize("changed", ["tokens", "ids"])
def test_other_tokens_are_found_when_they_are_read(changed: str, tmp_path: Path) -> None:
    """The manifests agree, so only reading the sequences can find the difference."""
    block, others = random_block(1, 12), random_block(2, 12)
    first = write(tmp_path / "a", block)
    if changed == "tokens":
        rows = np.arange(24)
        rows[7], rows[12 + 7] = 12 + 7, 7
        swapped = Block.concatenate([block, others]).take(rows[:12])
        sequences = dataclasses.replace(swapped.sequences, ids=block.sequences.ids)
    else:
        ids = block.sequences.ids.copy()
        ids[7] = 99
        swapped, sequences = block, dataclasses.replace(block.sequences, ids=ids)
    second = write(
        tmp_path / "b", Block(sequences=sequences, targets=swapped.targets, capture=block.capture)
    )
    mixed_stores([first, second], SHARES, "students.x.teachers")
    dataset = StoreDataset(first, second)
    for row in range(12):
        if row != 7:
            dataset[row]
    found = 99 if changed == "ids" else 7
    with pytest.raises(ColdstillError) as error:
        dataset.__getitems__([3, 7, 1])
    assert str(error.value).startswith(
        f"{tmp_path / 'a'} and {tmp_path / 'b'}: sequence 7 of the first is not the same as "
        f"sequence {found}, which the second has in its place: "
    )


def replaced(manifest: Manifest, section: str, **values: Any) -> dict[str, Any]:
    return {section: dataclasses.replace(getattr(manifest, section), **values)}


CHANGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokenizer": ("tokenizer", {"fingerprint": "5" * 64}, "tokenizer.fingerprint: 222222222222..."),
    "corpus": ("corpus", {"fingerprint": "6" * 64}, "corpus.fingerprint: 333333333333..."),
    "split": ("corpus", {"split": "heldout"}, "corpus.split: train"),
    "length": ("packing", {"sequence_length": 24}, "packing.sequence_length: 12"),
    "packing": ("packing", {"fingerprint": "7" * 64}, "packing.fingerprint: 444444444444..."),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stores_of_other_sequences_are_refused_at_the_start(change: str, tmp_path: Path) -> None:
    section, values, difference = CHANGES[change]
    block = random_block(1, 12)
    first = write(tmp_path / "a", block)
    second = write(tmp_path / "b", block, **replaced(first.manifest, section, **values))
    with pytest.raises(ColdstillError) as error:
        mixed_stores([first, second], SHARES, "students.x.teachers")
    value = str(next(iter(values.values())))
    shown = value if len(value) <= 16 else f"{value[:12]}..."
    start = "students.x.teachers: these stores hold different sequences: "
    assert str(error.value).startswith(
        f"{start}{difference} in {tmp_path / 'a'}, {shown} in {tmp_path / 'b'}; "
    )


def test_fewer_sequences_are_refused_and_other_teachers_accepted(tmp_path: Path) -> None:
    block = random_block(1, 12)
    first = write(tmp_path / "a", block)
    fewer = write(tmp_path / "b", block.take(np.arange(11)))
    with pytest.raises(ColdstillError, match=r"sequences: 12 in .*a, 11 in .*b; "):
        mixed_stores([first, fewer], SHARES, "x")
    other = write(
        tmp_path / "c",
        second_opinion(block, Capture(head=2, tail=0)),
        shard_sequences=5,
        **replaced(first.manifest, "teacher", fingerprint="9" * 64),
        **replaced(first.manifest, "packing", isolation="mask"),
    )
    assert mixed_stores([first, other], SHARES, "x") == ([first, other], list(SHARES))
    assert mixed_stores([first, other], (1.0, 0.0), "x") == ([first], [1.0])
    assert mixed_stores([first, other], (0.0, 1.0), "x") == ([first, other], [0.0, 1.0])


@pytest.mark.slow
def test_distant_stores_send_ahead_and_must_fit_the_cache_together(
    s3: Distance, tmp_path: Path
) -> None:
    block = random_block(1, 60)
    write_missing(f"{s3.url}/a", manifest_for(block, shard_sequences=3), block)
    other = second_opinion(block, Capture(head=6, tail=0))
    write_missing(f"{s3.url}/b", manifest_for(other, shard_sequences=6), other)

    def opened(limit: int) -> list[StoreReader]:
        cache = CacheSettings(folder=tmp_path / str(limit), bytes=limit)
        return [open_store(f"{s3.url}/{name}", cache=cache) for name in "ab"]

    sizes = [sorted((c.bytes for c in s.commits()), reverse=True)[:8] for s in opened(10**9)]
    needed = sum(sizes[0]) + sum(sizes[1])
    with pytest.raises(ColdstillError) as error:
        mixed_stores(opened(needed - 1), SHARES, "x")
    assert f"set it to at least {needed:,}, twice that" in str(error.value)
    before = s3.network.count(r"GET .*\.arrow")
    stores, _ = mixed_stores(opened(2 * needed), SHARES, "x")
    dataset = StoreDataset(*stores)
    for row in dataset.order(3, 0).tolist():
        own, theirs = dataset[row]
        wanted = other.take(own.sequences.ids).targets.head_ids
        np.testing.assert_array_equal(theirs.targets.head_ids, wanted)
    assert s3.network.count(r"GET .*\.arrow") - before == 20 + 10


@pytest.fixture(scope="module")
def two(
    corpus: SmallCorpus, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StoreReader, StoreReader]:
    """Two teachers over one corpus; of the first everything was kept, of the other a little."""
    folder = tmp_path_factory.mktemp("two")
    captures = (Capture(head=VOCABULARY, tail=0), Capture(head=8, tail=4))
    first, second = (
        capture_store(
            corpus,
            save_teacher(folder / f"teacher-{seed}", tokenizer, seed=seed),
            folder / f"store-{seed}",
            capture,
            shard_tokens=LENGTH * (3 + seed),
        )
        for seed, capture in enumerate(captures, 1)
    )
    return first, second


@pytest.mark.slow
def test_a_mixed_batch_gives_the_sum_of_both_teachers_alone(
    two: tuple[StoreReader, StoreReader],
) -> None:
    """Through the feed and the model's own forward."""
    objective, rows = ObjectiveConfig(), [3, 0, 7, 8, 5]
    captures = [(store.manifest.capture, str(store.place)) for store in two]

    def gradient(batch: Batch, terms: list[Term]) -> Any:
        model = make_model("llama", VOCABULARY)
        attach_objective(connect_head(model, VOCABULARY), terms)
        output = model(batch)
        torch.autograd.backward(output["loss"])
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        return float(output["loss"].detach()), found

    alone = []
    for store in two:
        batch = collate(StoreDataset(store).__getitems__(rows))
        alone.append(gradient(batch, terms_of(objective, store.manifest.capture, "x")))
    batch = collate(StoreDataset(*two).__getitems__(rows))
    value, found = gradient(batch, mixed_terms(objective, captures, SHARES, "x"))
    expected = sum(s * each for s, (each, _) in zip(SHARES, alone, strict=True))
    assert value == pytest.approx(expected, rel=1e-5)
    mixed = SHARES[0] * alone[0][1] + SHARES[1] * alone[1][1]
    assert float((found - mixed).norm() / mixed.norm()) < 1e-5
    assert float((found - alone[0][1]).norm() / mixed.norm()) > 0.1


def job(folder: Path, **changes: Any) -> StudentJob:
    return student_job(
        folder,
        architecture=ArchitectureConfig(layers=1, hidden=32, heads=2),
        objective=ObjectiveConfig(kl=0.8, cross_entropy=0.2),
        train={"steps": 4, "checkpoint_every": 2},
        **changes,
    )


@pytest.mark.slow
def test_a_share_of_zero_changes_nothing_bit_for_bit(
    two: tuple[StoreReader, StoreReader], tmp_path: Path
) -> None:
    train_student(job(tmp_path / "alone"), two[0])
    train_student(job(tmp_path / "mixed", others=two[1:], shares=(1.0, 0.0)), two[0])
    expect_same_training(tmp_path / "mixed", tmp_path / "alone")


@pytest.mark.slow
def test_a_mixture_records_both_teachers_and_resumes_as_if_uninterrupted(
    two: tuple[StoreReader, StoreReader], tmp_path: Path
) -> None:
    mixed: dict[str, Any] = {"others": two[1:], "shares": SHARES}
    train_student(job(tmp_path / "straight", **mixed), two[0])
    for line in lines(tmp_path / "straight"):
        parts = SHARES[0] * line["kl_teacher_0"] + SHARES[1] * line["kl_teacher_1"]
        assert line["kl"] == pytest.approx(parts, rel=1e-6)
        loss = 0.8 * line["kl"] + 0.2 * line["cross_entropy"]
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["teacher_mass"] == pytest.approx(1.0)
    with pytest.raises(KilledError):
        train_student(job(tmp_path / "killed", **mixed), two[0], killed_at(3))
    train_student(job(tmp_path / "killed", **mixed), two[0])
    expect_same_training(tmp_path / "killed", tmp_path / "straight")
