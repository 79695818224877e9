"""Small tokenizers of every kind, saved as folders, and stores of random records over texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from coldstill.data.alignment import labels
from coldstill.data.files import tokens_sha256
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Tail, Targets
from coldstill.data.store.manifest import TokenizerIdentity, format_settings
from coldstill.data.store.writer import ShardWriter
from oracles import manifest_for
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

END = "<|end|>"


def saved(
    folder: Path, tokenizer: Any, *, end: str = END, roles: dict[str, str] | None = None
) -> Path:
    """Save a tokenizer so that every loader reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        **(roles or {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def byte_pairs(
    merges: Sequence[tuple[str, str]],
    *,
    alphabet: Sequence[str] | None = None,
    end: str = END,
    extra: Sequence[str] = (),
    order: int | None = None,
) -> Any:
    """A byte-level tokenizer with these merges, written with Ġ for a space.

    alphabet  its letters; all 256 bytes if None
    extra     further special tokens
    order     seed of an order of ids; None counts them up
    """
    letters = sorted(alphabet or pre_tokenizers.ByteLevel.alphabet())
    names = list(dict.fromkeys([end, *extra, *letters, *(a + b for a, b in merges)]))
    ids = np.arange(len(names))
    if order is not None:
        np.random.default_rng(order).shuffle(ids)
    table = dict(zip(names, ids.tolist(), strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([end, *extra])
    return tokenizer


def characters(text: str, *, end: str = END) -> Any:
    """A tokenizer with one token for every character of a text."""
    names = [end, *sorted(set(text))]
    tokenizer = Tokenizer(models.BPE(vocab={n: i for i, n in enumerate(names)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([end])
    return tokenizer


def pieces(words: Sequence[str], *, end: str = "</s>") -> Any:
    """A tokenizer with `▁` for spaces, a space in front of every text, and bytes as a last
    resort, as those of Llama 2."""
    found = ["<unk>", "<s>", end, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    table = {name: index for index, name in enumerate(dict.fromkeys(found))}
    merges = []
    for word in words:
        for at in range(1, len(word)):
            if word[:at] in table and word[at:] in table:
                merges.append((word[:at], word[at:]))
                break
    tokenizer = Tokenizer(
        models.BPE(vocab=table, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", end])
    return tokenizer


def random_records(
    seed: int, labels_M: NDArray[Any], capture: Capture, vocabulary: int
) -> tuple[Targets, NDArray[np.float64]]:
    """Records of random distributions, and [M, V] the distributions."""
    random = np.random.default_rng([seed, 3])
    logits_MV = random.normal(0.0, 2.0, (len(labels_M), vocabulary))
    logp_MV = logits_MV - np.log(np.exp(logits_MV).sum(1, keepdims=True))
    return records_of(logp_MV, labels_M, capture, seed), np.exp(logp_MV)


def records_of(
    logp_MV: NDArray[np.float64], labels_M: NDArray[Any], capture: Capture, seed: int
) -> Targets:
    """The records that a capture keeps of some distributions, with independent samples."""
    random = np.random.default_rng([seed, 4])
    count = len(labels_M)
    order = np.argsort(-logp_MV, axis=1, kind="stable")
    head, outside = order[:, : capture.head], order[:, capture.head :]
    rows = np.arange(count)[:, None]
    masses = np.exp(logp_MV[rows, outside])
    drawn = np.zeros((count, capture.tail), np.int64)
    for row in range(count):
        if capture.tail:
            ends = masses[row].cumsum()
            points = (random.random() + np.arange(capture.tail)) / capture.tail * ends[-1]
            drawn[row] = outside[row][np.searchsorted(ends, points).clip(max=len(ends) - 1)]
    with np.errstate(divide="ignore"):
        log_tail = np.log(masses.sum(1))
    known = logp_MV[rows, drawn].astype(np.float32)
    return Targets(
        head_ids=head.astype(np.int32),
        head_logprobs=logp_MV[rows, head].astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        tail=Tail.from_draws(
            drawn.astype(np.int32), known if capture.keeps_tail_logprobs else None
        ),
        label_logprob=logp_MV[rows[:, 0], labels_M].astype(np.float32),
        entropy=-(np.exp(logp_MV) * logp_MV).sum(1).astype(np.float32),
        log_norm=np.stack(
            [np.log(np.exp(logp_MV / t).sum(1)) for t in capture.temperatures], 1
        ).astype(np.float32)
        if capture.temperatures
        else np.zeros((count, 0), np.float32),
    )


def packed(tokenizer: Any, texts: Sequence[str], *, together: int = 3, end: str = END) -> Any:
    """Sequences of `together` texts with an end token after each."""
    made, last = [], tokenizer.token_to_id(end)
    for first in range(0, len(texts), together):
        own = []
        for index, text in enumerate(texts[first : first + together], first):
            ids = np.array([*tokenizer.encode(text, add_special_tokens=False).ids, last], np.int32)
            own.append(TokenizedDocument(index, ids, np.ones(len(ids), np.bool_)))
        made.append(own)
    return build_sequences(0, made)


def text_store(
    root: Path,
    tokenizer: Path,
    texts: Sequence[str] | Block,
    capture: Capture,
    *,
    end: str = END,
    seed: int = 0,
    corpus: str = "3",
    **options: Any,
) -> Block:
    """Write a store of random records over texts, or of a block; returns what it holds."""
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    table = loaded.get_vocab(with_added_tokens=True)
    size = max(table.values()) + 1
    if isinstance(texts, Block):
        block = texts
    else:
        sequences = packed(loaded, texts, end=end)
        targets, _ = random_records(seed, labels(sequences), capture, size)
        block = Block(sequences=sequences, targets=targets, capture=capture)
    manifest = manifest_for(block, **options)
    settings = format_settings(
        options.get("codec", "plain"), options.get("store", "arrow"), size, capture
    )
    longest = int(block.sequences.tokens.lengths.max())
    manifest = replace(
        manifest,
        tokenizer=TokenizerIdentity(fingerprint=tokens_sha256(table), size=size),
        packing=replace(manifest.packing, sequence_length=longest, separator=(table[end],)),
        corpus=replace(manifest.corpus, fingerprint=corpus * 64),
        codec=settings["codec"],
        store=settings["store"],
    )
    with ShardWriter(root, manifest) as writer:
        for shard in writer.missing():
            writer.write(shard, block.take(np.array(manifest.shard_rows(shard))))
        with writer.place.scratch() as folder:
            shutil.copytree(tokenizer, folder / "tokenizer")
            writer.add_tokenizer(folder / "tokenizer")
    return block
