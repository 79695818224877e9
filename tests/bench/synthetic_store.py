"""Stores of any size and training jobs on them, for benchmarks that measure speed only."""

from __future__ import annotations

import dataclasses
import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.files import json_bytes
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Tail, Targets
from coldstill.data.store.commit import commit_json, parse_commit
from coldstill.data.store.layout import MANIFEST, commit_name, shard_name
from coldstill.data.store.manifest import TokenizerIdentity, format_settings
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store.writer import fitted
from coldstill.stages.config import TrainConfig
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.objective_config import ObjectiveConfig
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.loop import TrainingJob
from coldstill.stages.training.objective import terms_of
from oracles import manifest_for, write_missing
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_LINKS = 30_000
"""Names of one file; file systems allow a limited number."""


def make_block(vocabulary: int, length: int, count: int, capture: Capture) -> Block:
    """`count` sequences of one document each, with valid targets."""
    random = np.random.default_rng(0)
    rows = [
        [
            TokenizedDocument(
                index=row,
                tokens_T=random.integers(0, vocabulary, length).astype(np.int32),
                learned_T=np.ones(length, np.bool_),
            )
        ]
        for row in range(count)
    ]
    sequences = build_sequences(0, rows)
    positions = len(sequences.positions.values)
    falling = -np.sort(random.exponential(3.0, (positions, max(1, capture.head))).astype("f4"), 1)
    share = np.float32(0.8)
    logprobs = falling - np.log(np.exp(falling).sum(1, keepdims=True)) + np.log(share)
    first = random.integers(0, vocabulary - capture.head, (positions, 1))
    tail_ids = likely_draws(random, vocabulary, positions, capture.tail)
    head_ids = first + np.arange(capture.head)
    outside = np.log1p(-share) if capture.head else np.float32(0.0)
    targets = Targets(
        head_ids=head_ids.astype(np.int32),
        head_logprobs=logprobs[:, : capture.head].astype(np.float32),
        log_tail=np.full(positions, outside, np.float32),
        tail=Tail.from_draws(tail_ids.astype(np.int32)),
        label_logprob=np.full(positions, -4.0, np.float32),
        entropy=np.full(positions, 3.0, np.float32),
        log_norm=np.zeros((positions, 0), np.float32),
    )
    return Block(sequences=sequences, targets=targets, capture=capture)


def likely_draws(
    random: np.random.Generator, vocabulary: int, positions: int, draws: int
) -> NDArray[np.int64]:
    """[M, R] sorted draws of which most repeat, as those of a language model do: 15 different
    tokens of 50 on average."""
    # the rank of a draw is r or more with probability r^(-1 / 1.3)
    rank_MR = np.exp(random.exponential(1.3, (positions, draws))).astype(np.int64) - 1
    likeliest_M1 = random.integers(0, vocabulary, (positions, 1))
    found: NDArray[np.int64] = np.sort((likeliest_M1 + 7919 * rank_MR) % vocabulary, axis=1)
    return found


def make_store(
    folder: Path,
    block: Block,
    vocabulary: int,
    shard_sequences: int,
    codec: str = "compact",
    store: str = "arrow",
) -> StoreReader:
    """Write a block as a store; all its sequences have the same length."""
    manifest = manifest_for(
        block, shard_sequences=shard_sequences, block_sequences=min(32, shard_sequences)
    )
    settings = format_settings(codec, store, vocabulary, block.capture)
    manifest = dataclasses.replace(
        manifest,
        tokenizer=TokenizerIdentity(fingerprint="2" * 64, size=vocabulary),
        packing=dataclasses.replace(
            manifest.packing, sequence_length=int(block.sequences.tokens.lengths[0])
        ),
        codec=settings["codec"],
        store=settings["store"],
    )
    first = block.take(np.arange(min(32, shard_sequences)))
    write_missing(folder, fitted(manifest, first), block)
    return open_store(folder)


def repeat_shard(root: Path, shards: int, *, linked: bool = False) -> None:
    """Copy the only shard of a store until the store has `shards` of them.

    linked  name the same files again instead, which is faster
    """
    manifest = open_store(root).manifest
    whole = dataclasses.replace(manifest, sequences=manifest.shard_sequences * shards)
    (root / MANIFEST).write_bytes(json_bytes(whole.to_json()))
    commit = parse_commit((root / commit_name(0)).read_bytes(), "commit")
    suffix = manifest.make_store(root).suffix
    source = root / shard_name(0, suffix)
    for index in range(1, shards):
        target = root / shard_name(index, suffix)
        copy: Any = os.link if linked and index % _LINKS else shutil.copyfile
        if source.is_dir():
            shutil.copytree(source, target, copy_function=copy)
        else:
            copy(source, target)
        if index % _LINKS == 0:
            source = target
        copied = dataclasses.replace(commit, shard=index)
        (root / commit_name(index)).write_bytes(commit_json(copied))


def make_model(vocabulary: int, width: int, layers: int, length: int) -> Any:
    """A new Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=length,
            tie_word_embeddings=True,
        )
    )


def training_job(store: StoreReader, model: Any, folder: Path, **settings: Any) -> TrainingJob:
    """A job that trains a model from a store; `settings` go to `TrainConfig`."""
    capture, vocabulary = store.manifest.capture, store.manifest.tokenizer.size
    # one checkpoint at the end, of the same size on both sides of a comparison
    defaults: dict[str, Any] = {"checkpoint_every": settings["steps"], "log_every": 5}
    return TrainingJob(
        stage="bench",
        head=OutputHead(model, vocabulary),
        dataset=StoreDataset(store),
        isolation="positions",
        capture=capture,
        terms=terms_of(ObjectiveConfig(kl=0.9, cross_entropy=0.1), capture, "bench"),
        config=TrainConfig(**(defaults | settings)),
        sequence_length=store.manifest.packing.sequence_length,
        seed=0,
        folder=folder,
    )
