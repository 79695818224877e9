"""Small random records and the stores that hold them. No torch, so that child processes start fast.

Every block is a true sparse distribution: made from dense float64 logits, the slow and obvious way.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from coldstill.data.alignment import labels
from coldstill.data.branches import Branches
from coldstill.data.codecs import CODECS
from coldstill.data.codecs.compact import compiled
from coldstill.data.files import tokens_sha256
from coldstill.data.places.claims import claimed
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Block, Capture, Sequences, Tail, Targets
from coldstill.data.store.manifest import (
    CorpusIdentity,
    Manifest,
    Packing,
    TeacherIdentity,
    TokenizerIdentity,
    format_settings,
)
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import ShardWriter
from tokenizers import Tokenizer, models

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.columns import Columns
    from numpy.typing import NDArray

VOCABULARY = 40
LENGTH = 12
FULL = Capture(head=4, tail=3, temperatures=(0.5, 2.0), tail_logprobs=True, seed=7)

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
    "branches": Capture(head=0, tail=6, branches=True),
}


def random_sequences(seed: int, count: int, length: int = LENGTH) -> Sequences:
    """Some packed sequences of 1 to 3 documents; some have nothing to learn."""
    random = np.random.default_rng(seed)
    packed = []
    for row in range(count):
        sizes = random.integers(1, length // 3 + 1, int(random.integers(1, 4)))
        pieces = [
            TokenizedDocument(
                index=row * 3 + place,
                tokens_T=random.integers(0, VOCABULARY, size).astype(np.int32),
                learned_T=random.random(size) < 0.7,
            )
            for place, size in enumerate(sizes)
        ]
        packed.append(pieces)
    return build_sequences(0, packed)


def random_branches(seed: int, sequences: Sequences) -> Branches:
    """Up to three branches at each supervised position."""
    random = np.random.default_rng([seed, 2])
    places = [np.repeat(own, random.integers(0, 4, len(own))) for own in sequences.positions]
    sizes = [random.integers(2, 5, len(own)) for own in places]
    tokens = [random.integers(0, VOCABULARY, own.sum()) for own in sizes]
    weights = [random.random(len(own)) + 0.1 for own in places]
    return Branches(
        places=Ragged.from_rows(places, np.int32),
        sizes=Ragged.from_rows(sizes, np.int32),
        tokens=Ragged.from_rows(tokens, np.int32),
        weights=Ragged.from_rows(weights, np.float32),
    )


def random_targets(seed: int, labels_M: NDArray[Any], capture: Capture) -> Targets:
    """The distributions of a teacher with random logits, computed densely in float64."""
    random = np.random.default_rng([seed, 1])
    logits_MV = random.normal(0.0, 3.0, (len(labels_M), VOCABULARY))
    logprobs_MV = logits_MV - np.log(np.exp(logits_MV).sum(1, keepdims=True))
    order_MV = np.argsort(-logprobs_MV, axis=1, kind="stable")
    head_ids, outside = order_MV[:, : capture.head], order_MV[:, capture.head :]
    rows = np.arange(len(labels_M))[:, None]
    draws = random.integers(0, max(1, outside.shape[1]), (len(labels_M), capture.tail))
    tail_ids = np.sort(outside[rows, draws], axis=1) if capture.tail else draws
    with np.errstate(divide="ignore"):  # nothing is left outside a head of the whole vocabulary
        log_tail = np.log(np.exp(logprobs_MV[rows, outside]).sum(1))
    log_norm = [np.log(np.exp(logprobs_MV / t).sum(1)) for t in capture.temperatures]
    known = logprobs_MV[rows, tail_ids].astype(np.float32)
    return Targets(
        head_ids=head_ids.astype(np.int32),
        head_logprobs=logprobs_MV[rows, head_ids].astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        tail=Tail.from_draws(
            tail_ids.astype(np.int32), known if capture.keeps_tail_logprobs else None
        ),
        label_logprob=logprobs_MV[rows[:, 0], labels_M].astype(np.float32),
        entropy=-(np.exp(logprobs_MV) * logprobs_MV).sum(1).astype(np.float32),
        log_norm=np.array(log_norm, np.float32).reshape(-1, len(labels_M)).T.copy(),
    )


def random_record(
    vocabulary: int, count: int, capture: Capture, *, spread: float = 3.0, seed: int = 0
) -> Targets:
    """Records of a large vocabulary, without its logits: the head's tokens and the samples are
    anywhere in it, its first and last token among them."""
    random = np.random.default_rng([seed, vocabulary])
    width = capture.head + capture.tail
    ids = np.stack([random.choice(vocabulary, width, replace=False) for _ in range(count)])
    if width > 1:
        ids[0, :2] = 0, vocabulary - 1
        ids[1:3, 0] = vocabulary - 1, 0
        for row in (0, 1, 2):  # still distinct
            ids[row, 2:] = random.choice(np.arange(1, vocabulary - 1), width - 2, replace=False)
    logits = np.sort(random.normal(0.0, spread, (count, capture.head)), axis=1)[:, ::-1]
    rest = random.normal(0.0, spread, (count, 1))
    norm = np.logaddexp.reduce(np.concatenate([logits, rest], axis=1), axis=1)[:, None]
    return Targets(
        head_ids=ids[:, : capture.head].astype(np.int32),
        head_logprobs=(logits - norm).astype(np.float32),
        log_tail=(rest - norm)[:, 0].astype(np.float32),
        tail=Tail.from_draws(ids[:, capture.head :].astype(np.int32)),
        label_logprob=(-random.exponential(3.0, count)).astype(np.float32),
        entropy=random.exponential(2.0, count).astype(np.float32),
        log_norm=np.zeros((count, 0), np.float32),
    )


def with_targets(targets: Targets, capture: Capture) -> Block:
    """A block of one sequence in which every token but the first is learned."""
    tokens = np.zeros(len(targets) + 1, np.int32)
    document = TokenizedDocument(0, tokens, np.ones(len(tokens), np.bool_))
    sequences = build_sequences(0, [[document]])
    return Block(sequences=sequences, targets=targets, capture=capture)


def draws(tail: Tail) -> NDArray[np.int32]:
    """[M, R] every draw of the samples, by increasing id."""
    return np.sort(tail.ids[tail.draws(_count(tail))], axis=1)


def known_draws(tail: Tail) -> NDArray[np.float32]:
    """[M, R] their log-probabilities."""
    assert tail.logprobs is not None
    entries = tail.draws(_count(tail))
    order = np.argsort(tail.ids[entries], axis=1, kind="stable")
    return np.take_along_axis(tail.logprobs[entries], order, axis=1)


def _count(tail: Tail) -> int:
    """R."""
    return int(tail.counts.sum(dtype=np.int64)) // max(1, len(tail))


def random_block(seed: int, count: int, capture: Capture = FULL) -> Block:
    """Sequences with their targets."""
    sequences = random_sequences(seed, count)
    targets = random_targets(seed, labels(sequences), capture)
    if capture.branches:
        sequences = replace(sequences, branches=random_branches(seed, sequences))
    return Block(sequences=sequences, targets=targets, capture=capture)


def manifest_for(
    block: Block,
    *,
    shard_sequences: int = 4,
    block_sequences: int = 3,
    codec: str = "plain",
    store: str = "arrow",
) -> Manifest:
    """The manifest of a store that is to hold exactly this block."""
    settings = format_settings(codec, store, VOCABULARY, block.capture)
    return Manifest(
        teacher=TeacherIdentity(
            name="ORG/teacher",
            fingerprint="1" * 64,
            family="llama",
            dtype="float32",
            parameters=1000,
            bytes=4000,
        ),
        tokenizer=TokenizerIdentity(fingerprint="2" * 64, size=VOCABULARY),
        corpus=CorpusIdentity(fingerprint="3" * 64, split="train", documents=9),
        packing=Packing(
            sequence_length=LENGTH,
            together=True,
            isolation="positions",
            separator=(0,),
            fingerprint="4" * 64,
        ),
        capture=block.capture,
        sequences=len(block),
        shard_sequences=shard_sequences,
        block_sequences=block_sequences,
        codec=settings["codec"],
        store=settings["store"],
    )


def write_missing(root: str | Path, manifest: Manifest, block: Block) -> None:
    """Write the shards that a store still lacks, as stage one does."""
    with ShardWriter(root, manifest) as writer:
        for shard in writer.missing():
            writer.write(shard, block.take(np.array(manifest.shard_rows(shard))))


def whole_store(
    root: Path, block: Block, *, corpus: str = "3", words: str = "word", **options: Any
) -> Manifest:
    """A complete store with its tokenizer."""
    tokenizer = TokenizerIdentity(fingerprint=write_tokenizer(root, words), size=VOCABULARY)
    manifest = replace(manifest_for(block, **options), tokenizer=tokenizer)
    manifest = replace(manifest, corpus=replace(manifest.corpus, fingerprint=corpus * 64))
    write_missing(root, manifest, block)
    return manifest


def write_tokenizer(root: Path, words: str) -> str:
    """Write a tokenizer with the vocabulary of the blocks; returns its fingerprint."""
    table = {f"{words}{index}": index for index in range(VOCABULARY)}
    (root / "tokenizer").mkdir(parents=True, exist_ok=True)
    model: Any = models.WordLevel(table, unk_token=f"{words}0")
    Tokenizer(model).save(str(root / "tokenizer" / "tokenizer.json"))
    return tokens_sha256(table)


def as_stored(block: Block, codec: str) -> Block:
    """The block after encoding and decoding; the tests of codecs bound the difference."""
    made = CODECS[codec].fitting(vocabulary=VOCABULARY, capture=block.capture)
    return made.decode(made.encode(block), block.capture)


def everything(path: str | Path) -> Block:
    """All that a store holds, in its order."""
    store = open_store(path)
    return store.read(np.arange(len(store)))


def assert_same_columns(found: Columns, wanted: Columns) -> None:
    """The same names, types, shapes and numbers."""
    assert set(found) == set(wanted)
    for name, column in wanted.items():
        pairs = zip(_arrays(found[name]), _arrays(column), strict=True)
        for one, other in pairs:
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            assert np.array_equal(one, other), name


def _arrays(column: Any) -> list[NDArray[Any]]:
    """The arrays of a column at any depth of lists."""
    if isinstance(column, np.ndarray):
        return [column]
    return [array for f in fields(column) for array in _arrays(getattr(column, f.name))]


def numbers(part: Any) -> dict[str, Any]:
    """Every array of sequences or targets, by name. Of samples, every draw."""
    found = {f.name: getattr(part, f.name) for f in fields(part)}
    if (tail := found.pop("tail", None)) is not None:
        found["draws"] = draws(tail)
        found["known_draws"] = None if tail.logprobs is None else known_draws(tail)
    if (branches := found.pop("branches", None)) is not None:
        found |= {f"branches.{name}": own for name, own in branches.columns().items()}
    ragged = {name: value for name, value in found.items() if isinstance(value, Ragged)}
    return found | {name: (value.values, value.offsets) for name, value in ragged.items()}


def assert_same(found: Block, wanted: Block) -> None:
    """Alike in every number."""
    assert found.capture == wanted.capture
    np.testing.assert_equal(numbers(found.sequences), numbers(wanted.sequences))
    np.testing.assert_equal(numbers(found.targets), numbers(wanted.targets))


def as_bytes(block: Block) -> dict[str, Any]:
    """Every array of a block: type, shape and bytes."""
    parts = numbers(block.sequences) | numbers(block.targets)
    tail = block.targets.tail
    parts |= {"ids": tail.ids, "counts": tail.counts, "offsets": tail.offsets}
    arrays = {name: part if isinstance(part, tuple) else (part,) for name, part in parts.items()}
    return {
        name: [None if a is None else (a.dtype, a.shape, a.tobytes()) for a in each]
        for name, each in arrays.items()
    }


def compiled_at_once() -> None:
    """For a process that inherits nothing."""
    compiled.WORTHWHILE = 0
    assert compiled.loops(0) is not None


def digest(root: Path) -> str:
    """Everything that a store holds, as text."""
    return repr(as_bytes(everything(root)))


def cached_bytes(folder: Path) -> int:
    """The bytes in a cache, counted while no process makes room in it."""
    with claimed(folder / ".lock", wait=True):
        while True:
            with contextlib.suppress(FileNotFoundError):  # a file was deleted meanwhile
                return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digests(root: Path) -> dict[str, str]:
    """Every file of a store but its lock, by content."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
