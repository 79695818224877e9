"""Writes a store from targets of any origin: `coldstill.StoreWriter`."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .alignment import labels, supervised_positions
from .errors import ColdstillError
from .files import json_bytes
from .given_targets import given_targets, guesses_labels, numbers, selected_targets
from .maintenance.checks import Rules, check_block
from .ragged import Ragged
from .schema import Block, Capture, Sequences, sequence_hash
from .store.layout import MANIFEST, SHARDS, TOKENIZER, UNFINISHED, commit_name, committed
from .store.manifest import (
    MOST_SHARDS,
    CorpusIdentity,
    Manifest,
    Packing,
    TeacherIdentity,
    difference,
    format_settings,
    parse_manifest,
)
from .store.reader import StoreReader
from .store.writer import BLOCK_TOKENS, ShardWriter, fitted
from .tokenizer_files import save_tokenizer, tokenizer_identity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike


class StoreWriter:
    """Writes a store sequence by sequence, from targets that you computed or received.

    Use it as a context manager. Shards are closed as they fill, and the manifest is written last:
    if the block raises an error, the folder holds no store. With `resume`, finished shards are kept
    then, and the next run begins with `len(writer)` sequences: add those that follow.

    Example: the two most probable tokens at each of three positions.

        with coldstill.StoreWriter(
            "store",
            teacher="my-teacher",
            tokenizer="path/to/tokenizer",
            capture=coldstill.Capture(head=2, tail=0),
            sequence_length=8,
        ) as writer:
            writer.add(
                [5, 9, 2, 7],
                head_ids=[[9, 4], [2, 1], [7, 3]],
                head_logprobs=np.log([[0.7, 0.2], [0.6, 0.3], [0.5, 0.25]]),
            )

    The store passes `coldstill store verify`. With a tokenizer, `coldstill train-student` can train
    on it (`logits.path` in the recipe).

    Raises
        ColdstillError: on entering, if the folder already holds a store or another process writes
            it; on leaving, if no sequence was added; at any time, if the disk is full
    """

    def __init__(
        self,
        path: str | Path,
        *,
        teacher: str | TeacherIdentity,
        capture: Capture,
        sequence_length: int,
        tokenizer: Any = None,
        vocabulary: int | None = None,
        split: Literal["train", "heldout"] = "train",
        codec: str | dict[str, Any] = "compact",
        store: str | dict[str, Any] = "arrow",
        shard_tokens: int = 262_144,
        resume: bool = False,
    ) -> None:
        """Describe the store. Nothing is written before the context is entered.

        path             folder, or address such as s3://bucket/store
        teacher          name of the teacher; a `TeacherIdentity` also records its fingerprint
        capture          which part of the distribution each call of `add` passes: K head tokens, R
                         samples, C temperatures
        sequence_length  T: largest number of tokens in a sequence
        tokenizer        folder that holds tokenizer.json, or a tokenizer of transformers; it is
                         copied into the store
        vocabulary       V, the number of tokens; required without a tokenizer
        split            "train" for a store to train from, "heldout" for one to evaluate on
        codec            "compact" (few bytes) or "plain" (exact float32), or a table with settings
        store            "arrow" or "zarr", or a table with settings
        shard_tokens     most tokens in a shard, padding included; memory holds one shard
        resume           keep finished shards if an error ends the block, and continue after them

        Raises
            ColdstillError: neither tokenizer nor vocabulary, or a value that no store can have
        """
        if not isinstance(capture, Capture):
            raise ColdstillError(
                f"StoreWriter: capture = {capture!r}: expected coldstill.Capture(...)"
            )
        if capture.chunks or capture.branches or capture.guessed_labels:
            raise ColdstillError(
                "StoreWriter: capture: chunks, branches and guessed_labels are found out, not "
                "chosen; leave them out (coldstill store retokenize writes stores with a "
                "student's tokens)"
            )
        for name, value in (("sequence_length", sequence_length), ("shard_tokens", shard_tokens)):
            if not isinstance(value, int) or value < 1:
                raise ColdstillError(
                    f"StoreWriter: {name} = {value!r}: expected a whole number above 0"
                )
        self._tokenizer = tokenizer
        identity = tokenizer_identity(tokenizer, vocabulary)
        if isinstance(teacher, str):
            teacher = TeacherIdentity(
                name=teacher, fingerprint="", family="", dtype="", parameters=0, bytes=0
            )
        per_shard = max(1, shard_tokens // sequence_length)
        settings = format_settings(codec, store, identity.size, capture)
        promised = Manifest(
            teacher=teacher,
            tokenizer=identity,
            corpus=CorpusIdentity(fingerprint="", split=split, documents=0),
            packing=Packing(
                sequence_length=sequence_length,
                together=False,
                isolation="single",
                separator=(),
                fingerprint="",
            ),
            capture=capture,
            sequences=per_shard * MOST_SHARDS,
            shard_sequences=per_shard,
            block_sequences=min(per_shard, max(1, BLOCK_TOKENS // sequence_length)),
            codec=settings["codec"],
            store=settings["store"],
        )
        self.manifest = parse_manifest(json_bytes(promised.to_json()), str(path))
        """The manifest, whose counts and fingerprints are final once the context is left."""
        self._writer = ShardWriter(path, self.manifest)
        self._rules = Rules(
            vocabulary=identity.size,
            sequence_length=sequence_length,
            capture=capture,
            maximum=0.0,
            rounding=0.0,
        )
        self._resume = resume
        self._waiting: list[Block] = []
        self._sequences = self._shard = self._documents = 0
        self._guessed = False
        self._digest = hashlib.sha256()
        self._held = contextlib.ExitStack()
        self._entered = False

    def __enter__(self) -> StoreWriter:
        place = self._writer.place
        with contextlib.ExitStack() as held:
            held.enter_context(place.lock())
            begun = self._resume and place.exists(UNFINISHED)
            if place.exists(MANIFEST) or (place.names(SHARDS) and not begun):
                raise ColdstillError(
                    f"{place}: already holds a store, or a part of one whose writer was killed; "
                    "choose another folder, or delete this one"
                )
            place.clear()
            if begun:
                self._continue()
            self._held = held.pop_all()
        self._entered = True
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._entered = False
        with self._held, contextlib.ExitStack() as undo:
            if not self._resume:
                undo.callback(self._writer.place.remove, SHARDS)
            if error is None:
                self._finish()
                undo.pop_all()

    def _continue(self) -> None:
        """Count what the whole shards of an earlier run hold, and delete the others. Raises
        ColdstillError if that run wrote another store."""
        place = self._writer.place
        kept = parse_manifest(place.read(UNFINISHED), place.path(UNFINISHED))
        if changed := difference(kept, self.manifest):
            raise ColdstillError(
                f"{place}: begun differently: {changed}; choose another folder, or delete this one"
            )
        self.manifest = kept
        numbers = committed(place.names(SHARDS))
        store = StoreReader(place, kept, numbers)
        for shard in numbers:
            try:
                commit = store.commit(shard) if shard == self._shard else None
            except ColdstillError:  # the last shard of a store, which has fewer sequences
                commit = None
            if commit is None:
                place.remove(commit_name(shard))
                continue
            for number in range(len(kept.block_sizes(shard))):
                hashes = store.block(shard, number).sequences.hashes
                self._digest.update(hashes.astype("<u8").tobytes())
            self._shard += 1
            self._sequences += commit.sequences
            self._documents += commit.documents

    def __len__(self) -> int:
        """Number of sequences added so far, in earlier runs too."""
        return self._sequences

    def add(
        self,
        token_ids: ArrayLike,
        *,
        logprobs: ArrayLike | None = None,
        head_ids: ArrayLike | None = None,
        head_logprobs: ArrayLike | None = None,
        tail_ids: ArrayLike | None = None,
        tail_logprobs: ArrayLike | None = None,
        log_tail: ArrayLike | None = None,
        label_logprob: ArrayLike | None = None,
        entropy: ArrayLike | None = None,
        log_norm: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        document_starts: Sequence[int] = (0,),
    ) -> None:
        """Add one sequence with the targets at its M supervised positions.

        A position t has the teacher's distribution of token t + 1. All log-probabilities are
        natural logarithms over the whole vocabulary, at temperature 1.

        token_ids        [T] the token ids, 0 to V - 1
        logprobs         [M, V] log-probabilities of the whole vocabulary, from which head, samples
                         and all other targets are taken; -inf for a token that cannot come. Pass
                         no other target with it
        head_ids         [M, K] the K most probable tokens, most probable first
        head_logprobs    [M, K] their log-probabilities
        tail_ids         [M, R] tokens sampled from outside the head, in any order; may repeat
        tail_logprobs    [M, R] their log-probabilities, if the capture keeps them
        log_tail         [M] log of the mass outside the head; default: 1 minus the head's mass
        label_logprob    [M] log-probability of token t + 1; default: taken from the head or the
                         samples, elsewhere the mean probability outside the head
        entropy          [M] in nats; default: exact on the head, outside it estimated from the
                         samples if their log-probabilities are known, otherwise that of an even
                         distribution
        log_norm         [M, C] `logsumexp(log p / T)` per captured temperature; has no default
        positions        [M] the supervised positions, increasing; default: every position whose
                         next token belongs to the same document
        document_starts  [D] position of the first token of each document; the first is 0

        The default of `entropy` only changes reported values, not gradients. If the default of
        `label_logprob` is a guess for some label, the store says so, and the objective
        `chunk_likelihood` and `coldstill store retokenize` refuse it.
        They exist only for a capture with a head, or with log-probabilities of its samples.

        Raises
            ColdstillError: a wrong shape, an id outside the vocabulary, a log-probability above 0,
                a head that is not sorted or sums to more than 1 (where, and which), or a call
                outside the `with` block
        """
        where = f"{self._writer.place}: sequence {self._sequences}"
        if not self._entered:
            raise ColdstillError(
                f"{where}: the writer is not open; use it as `with StoreWriter(...) as writer:`"
            )
        sequences = self._one_sequence(where, token_ids, positions, document_starts)
        given = {
            "head_ids": head_ids,
            "head_logprobs": head_logprobs,
            "tail_ids": tail_ids,
            "tail_logprobs": tail_logprobs,
            "log_tail": log_tail,
            "label_logprob": label_logprob,
            "entropy": entropy,
            "log_norm": log_norm,
        }
        capture, vocabulary = self.manifest.capture, self._rules.vocabulary
        if logprobs is None:
            targets = given_targets(where, given, labels(sequences), capture, vocabulary)
            if label_logprob is None and guesses_labels(targets, labels(sequences)):
                self._guessed = True
        else:
            if beside := [name for name, value in given.items() if value is not None]:
                raise ColdstillError(f"{where}: {beside[0]} was passed beside logprobs")
            targets = selected_targets(where, logprobs, sequences, capture, vocabulary)
        block = Block(sequences=sequences, targets=targets, capture=capture)
        if found := check_block(block, 1, self._rules):
            at = "" if found[0].position is None else f", position {found[0].position}"
            raise ColdstillError(f"{where}{at}: {found[0].what}")
        self._digest.update(sequences.hashes.astype("<u8").tobytes())
        self._sequences += 1
        self._documents += len(document_starts)
        self._waiting.append(block)
        if len(self._waiting) == self.manifest.shard_sequences:
            self._write_shard()

    def _one_sequence(
        self, where: str, token_ids: Any, positions: Any, document_starts: Sequence[int]
    ) -> Sequences:
        tokens_T = numbers(where, "token_ids", token_ids, np.int32, (None,))
        starts_D = numbers(where, "document_starts", document_starts, np.int32, (None,))
        # the rules that index the sequence come before anything is looked up in it
        if len(starts_D) == 0 or starts_D.min() < 0 or starts_D.max() >= len(tokens_T):
            raise ColdstillError(
                f"{where}: document_starts {starts_D.tolist()[:5]}: expected positions from 0 to "
                f"{len(tokens_T) - 1}"
            )
        if starts_D[0] != 0:
            raise ColdstillError(
                f"{where}: document_starts {starts_D.tolist()[:5]}: the first must be 0"
            )
        if positions is None:
            positions = supervised_positions(np.ones(len(tokens_T), np.bool_), starts_D)
        positions_M = numbers(where, "positions", positions, np.int32, (None,))
        if len(positions_M) and (positions_M.min() < 0 or positions_M.max() >= len(tokens_T) - 1):
            raise ColdstillError(
                f"{where}: positions from {positions_M.min()} to {positions_M.max()}: expected 0 "
                f"to {len(tokens_T) - 2}, since the last token has no next one"
            )
        documents_D = np.arange(self._documents, self._documents + len(starts_D))
        return Sequences(
            ids=np.array([self._sequences], np.int64),
            tokens=Ragged.from_rows([tokens_T], np.int32),
            document_starts=Ragged.from_rows([starts_D], np.int32),
            document_ids=Ragged.from_rows([documents_D], np.int64),
            positions=Ragged.from_rows([positions_M], np.int32),
            hashes=np.array([sequence_hash(tokens_T, starts_D, positions_M)], np.uint64),
        )

    def _write_shard(self) -> None:
        block, self._waiting = Block.concatenate(self._waiting), []
        if self._shard == 0:
            first = block.take(np.arange(min(len(block), self.manifest.block_sequences)))
            self.manifest = fitted(self.manifest, first)
            if self._resume:
                self._writer.place.write(UNFINISHED, json_bytes(self.manifest.to_json()))
        self._writer.use(self.manifest)
        self._writer.write(self._shard, block)
        self._shard += 1

    def _finish(self) -> None:
        """Write the last shard, the tokenizer and, last, the manifest."""
        place = self._writer.place
        if self._sequences == 0:
            raise ColdstillError(f"{place}: no sequence was added, so there is no store to write")
        together = self._documents > self._sequences
        digest = self._digest.hexdigest()
        self.manifest = replace(
            self.manifest,
            capture=replace(self.manifest.capture, guessed_labels=self._guessed),
            sequences=self._sequences,
            corpus=replace(self.manifest.corpus, fingerprint=digest, documents=self._documents),
            packing=replace(
                self.manifest.packing,
                together=together,
                isolation="positions" if together else "single",
                fingerprint=digest,
            ),
        )
        if self._waiting:
            self._write_shard()
        if self._tokenizer is not None:
            with place.scratch() as folder:
                save_tokenizer(self._tokenizer, folder / TOKENIZER)
                self._writer.add_tokenizer(folder / TOKENIZER)
        place.write(MANIFEST, json_bytes(self.manifest.to_json()))
        place.remove(UNFINISHED)
