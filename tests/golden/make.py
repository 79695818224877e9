"""Writes the golden stores of the present format that are missing: `python tests/golden/make.py`.

They are committed and never written again: what an old coldstill wrote must stay readable.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from coldstill import __version__
from coldstill.data.codecs import CODECS
from coldstill.data.files import tokens_sha256
from coldstill.data.formats import STORES
from coldstill.data.maintenance.retokenize import Decisions, retokenize
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Block, Capture, Sequences, Tail, Targets, count_type
from coldstill.data.store.manifest import (
    FORMAT_VERSION,
    Manifest,
    TokenizerIdentity,
    format_settings,
)
from coldstill.data.store.reader import open_store
from coldstill.data.store.writer import fitted
from oracles import VOCABULARY, draws, known_draws, manifest_for, random_block, write_missing
from spellings import byte_pairs, saved, text_store
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

HERE = Path(__file__).parent
WIDE_VOCABULARY = 300_000
WIDE = ((5, 300, True), (0, 50, False), (8, 0, False))
"""Head, tail, and whether log-probabilities of the samples are kept."""


def main() -> None:
    """Write each missing pair of codec and store, and what reading it gives."""
    folder = HERE / f"v{FORMAT_VERSION}"
    block = random_block(20, 5)
    table = {f"token{i}": i for i in range(VOCABULARY)}
    for codec in CODECS:
        for store in STORES:
            if (folder / f"{codec}-{store}").exists():
                continue
            # a Zarr group has many files: one shard is enough of them
            shard = 3 if store == "arrow" else 5
            manifest = manifest_for(
                block, shard_sequences=shard, block_sequences=2, codec=codec, store=store
            )
            tokenizer = replace(manifest.tokenizer, fingerprint=tokens_sha256(table))
            manifest = fitted(replace(manifest, tokenizer=tokenizer), block)
            _write(folder / f"{codec}-{store}", manifest, block, table)
    for head, tail, known in WIDE:
        name = f"compact-arrow-{head}-{tail}"
        if (folder / name).exists():
            continue
        block = wide_block(Capture(head=head, tail=tail, tail_logprobs=known))
        manifest = manifest_for(block, shard_sequences=2, block_sequences=1, codec="compact")
        settings = format_settings("compact", "arrow", WIDE_VOCABULARY, block.capture)
        tokenizer = TokenizerIdentity(fingerprint="2" * 64, size=WIDE_VOCABULARY)
        manifest = replace(manifest, tokenizer=tokenizer, codec=settings["codec"])
        _write(folder / name, fitted(manifest, block.take(np.arange(1))), block, None)
    for codec in CODECS:
        for store in STORES:
            for name in ("chunks", "branches"):
                root = folder / f"{name}-{codec}-{store}"
                if not root.exists():
                    with tempfile.TemporaryDirectory() as scratch:
                        _write_chunks(root, Path(scratch), codec, store, name == "branches")
    version = {"coldstill": __version__, "format": FORMAT_VERSION}
    if not (folder / "written_by.json").exists():
        (folder / "written_by.json").write_text(json.dumps(version) + "\n")


def wide_block(capture: Capture) -> Block:
    """A block in which every part of the codec is used: ids over a large vocabulary, tokens that
    were drawn often, and labels from every place of a record, or from none."""
    random = np.random.default_rng(5)
    count, head, tail = 16, capture.head, capture.tail
    entries = []
    labels = []
    for position in range(count):
        # most ids are small, some are far apart
        scale = WIDE_VOCABULARY ** random.random(4 * (head + tail))
        ids = random.permutation(np.unique(scale.astype(np.int64)) - 1)
        kinds = min(tail, int(random.integers(2, 30)))
        head_ids, drawn = ids[:head], np.sort(ids[head : head + kinds])
        shares = random.dirichlet(np.full(max(1, kinds), 0.3))
        counts = 1 + random.multinomial(tail - kinds, shares)[:kinds]
        weights = np.sort(random.dirichlet(np.full(max(1, head), 0.7)))[::-1][:head]
        rest = random.uniform(0.05, 0.4) if head else 1.0
        logprobs = np.log(weights * (1.0 - rest))
        known = (logprobs[-1] if head else 0.0) - random.uniform(1.0, 20.0, kinds)
        of_head = [int(head_ids[0]), int(head_ids[-1])] if head else []
        of_tail = [int(drawn[counts.argmax()]), int(drawn[-1]), int(drawn[0])] if tail else []
        places = [*of_head, *of_tail, int(ids[head + kinds])]
        labels.append(places[position % len(places)])
        sure = dict(zip(head_ids.tolist(), logprobs, strict=True))
        sure |= dict(zip(drawn.tolist(), known, strict=True)) if capture.keeps_tail_logprobs else {}
        entries.append((head_ids, logprobs, rest, drawn, counts, known, sure.get(labels[-1], -9.5)))
    tokens = np.array([3, *labels], np.int32)
    half = count // 2
    pieces = [tokens[: half + 1], np.concatenate([tokens[half : half + 1], tokens[half + 1 :]])]
    sequences = build_sequences(
        0,
        [
            [TokenizedDocument(index=i, tokens_T=piece, learned_T=np.ones(len(piece), np.bool_))]
            for i, piece in enumerate(pieces)
        ],
    )
    sizes = [len(entry[3]) for entry in entries]
    targets = Targets(
        head_ids=np.array([entry[0] for entry in entries], np.int32).reshape(count, head),
        head_logprobs=np.array([entry[1] for entry in entries], np.float32).reshape(count, head),
        log_tail=np.log([entry[2] for entry in entries]).astype(np.float32),
        tail=Tail(
            ids=np.concatenate([entry[3] for entry in entries]).astype(np.int32),
            counts=np.concatenate([entry[4] for entry in entries]).astype(count_type(tail)),
            logprobs=np.concatenate([entry[5] for entry in entries]).astype(np.float32)
            if capture.keeps_tail_logprobs
            else None,
            offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        ),
        label_logprob=np.array([entry[6] for entry in entries], np.float32),
        entropy=random.uniform(0.0, 9.0, count).astype(np.float32),
        log_norm=np.zeros((count, 0), np.float32),
    )
    return Block(sequences=sequences, targets=targets, capture=capture)


def _write(root: Path, manifest: Manifest, block: Block, table: dict[str, int] | None) -> None:
    write_missing(root, manifest, block)
    if table is not None:
        (root / "tokenizer").mkdir()
        words = WordLevel(table, unk_token="token0")
        Tokenizer(words).save(str(root / "tokenizer/tokenizer.json"))
    codec = manifest.make_codec(root)
    expected = as_json(codec.decode(codec.encode(block), block.capture))
    (root.parent / f"{root.name}.json").write_text(json.dumps(expected, indent=0) + "\n")
    shutil.rmtree(root / "__pycache__", ignore_errors=True)


def _write_chunks(root: Path, scratch: Path, codec: str, store: str, branches: bool) -> None:
    """Write a store in the tokens of a student, and what reading it gives."""
    # some letters of the teacher have no token of the student and occur in no text
    letters, texts = (
        ("abcstuvwxyzĠ", "abcĠ"),
        ["abc ab", "a bca c", "cc abcab a", "ab", "b abc abc c"],
    )
    pairs = [("a", "b"), ("ab", "c"), ("Ġ", "abc")], [("b", "c"), ("Ġ", "a")]
    teacher, student = (
        saved(scratch / one, byte_pairs(merges, alphabet=one))
        for one, merges in zip(letters, pairs, strict=True)
    )
    capture = Capture(head=1, tail=2, seed=7)
    text_store(scratch / "teacher", teacher, texts, capture, shard_sequences=1)
    decisions = Decisions(branches=0.5 * branches)
    manifest = retokenize(str(scratch / "teacher"), str(scratch / "exact"), student, decisions)
    exact = open_store(scratch / "exact")
    block = exact.read(np.arange(len(exact)))
    # one token, several, inside, and nothing known
    assert set(block.targets.chunk_sizes.ravel().tolist()) == {1, 2, 0, -1}
    settings = format_settings(codec, store, manifest.tokenizer.size, block.capture)
    shard = 1 if store == "arrow" else len(block)
    manifest = replace(
        manifest, shard_sequences=shard, codec=settings["codec"], store=settings["store"]
    )
    _write(root, fitted(manifest, block), block, None)
    (root / "tokenizer").mkdir()
    shutil.copy(student / "tokenizer.json", root / "tokenizer")


def as_json(block: Block) -> dict[str, Any]:
    """Everything that a block holds, as lists; infinities as text. Of samples, every draw."""
    tail = block.targets.tail
    values = {f.name: getattr(block.sequences, f.name) for f in fields(Sequences)}
    if (branches := values.pop("branches")) is not None:
        values |= {f"branches.{name}": own for name, own in branches.columns().items()}
    values |= {f.name: getattr(block.targets, f.name) for f in fields(Targets)}
    del values["tail"]
    values["tail_ids"] = draws(tail)
    values["tail_logprobs"] = None if tail.logprobs is None else known_draws(tail)
    return {name: _listed(value) for name, value in values.items()}


def _listed(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Ragged):
        return [row.tolist() for row in value]
    return value.tolist()


if __name__ == "__main__":
    main()
