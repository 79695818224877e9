"""Stage one from tokens on disk to committed shards, against the bare forward pass.

Both sides run the same model over the same batches.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coldstill.data.files import json_bytes
from coldstill.data.formats.arrow import ArrowStore
from coldstill.data.prepared import SequenceFile, SequenceWriter, TokenizedDocument
from coldstill.data.schema import Capture
from coldstill.data.store.layout import MANIFEST, SHARDS
from coldstill.data.store.manifest import (
    CorpusIdentity,
    Manifest,
    Packing,
    TeacherIdentity,
    TokenizerIdentity,
    format_settings,
)
from coldstill.data.store.writer import ShardWriter
from coldstill.stages.capture.forward import TeacherForward
from coldstill.stages.capture.plan import CapturePlan
from coldstill.stages.capture.shards import capture_shards
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.models.device import best_device
from coldstill.stages.models.inputs import model_inputs
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.report import Reporter, silent
from measure import Figure, compare_memory, compare_times, write
from real_teacher import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

CAPTURES = (Capture(head=64, tail=0), Capture(head=0, tail=24), Capture(head=16, tail=16))


@dataclass(frozen=True, slots=True)
class Shape:
    """A model with random weights, which do not change its speed."""

    name: str
    family: str
    sizes: dict[str, int]
    dtype: torch.dtype
    batch: int
    """Sequences per forward pass."""
    batches: int
    """Forward passes per measurement."""
    vocabularies: tuple[int, ...] = (50_257, 128_256)
    length: int = 512
    """Tokens of a sequence."""


GPT2_SMALL = Shape(
    "GPT-2 small", "gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}, torch.float32, 4, 2
)
GPT2_MEDIUM = Shape(
    "GPT-2 medium", "gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, torch.float32, 4, 1
)
_VOCABULARY = SIZES["vocab_size"]
_REST = {name: size for name, size in SIZES.items() if name != "vocab_size"}
SMOLLM2 = Shape("SmolLM2-135M", "llama", _REST, torch.float32, 8, 1, (_VOCABULARY,), 256)
# few tokens: a CPU without bf16 instructions is more than a hundred times slower than in fp32
SMOLLM2_BF16 = Shape("SmolLM2-135M, bf16", "llama", _REST, torch.bfloat16, 1, 1, (_VOCABULARY,), 16)


def _llama(name: str, hidden: int, layers: int, heads: int, feed_forward: int) -> Shape:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": feed_forward,
        "max_position_embeddings": 4096,
    }
    return Shape(name, "llama", sizes, torch.bfloat16, 16, 12)


ONE_BILLION = _llama("1B", 2048, 16, 32, 8192)


def shapes() -> list[Shape]:
    """The shapes that this machine can run."""
    if not torch.cuda.is_available():
        return [GPT2_SMALL, GPT2_MEDIUM, SMOLLM2, SMOLLM2_BF16]
    return [ONE_BILLION, _llama("8B", 4096, 32, 32, 14336)]


class Side:
    """One model, a corpus of random tokens, and a store to write to."""

    def __init__(
        self,
        shape: Shape,
        vocabulary: int,
        folder: Path,
        *,
        store: Path | None = None,
        shards: int = 1,
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.vocabulary, self.folder = shape, vocabulary, folder
        self.store, self.shards = store or folder / "logits", shards
        config = AutoConfig.for_model(shape.family, vocab_size=vocabulary, **shape.sizes)
        with torch.device(best_device()):
            model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
        self.model: Any = model.eval()
        self.teacher = Teacher(head=OutputHead(model, vocabulary), isolation="positions")
        self.sequences = self._corpus()

    def _corpus(self) -> SequenceFile:
        random = np.random.default_rng(0)
        with ArrowStore().create(self.folder / "corpus.arrow") as add:
            writer = SequenceWriter(add)
            for i in range(self.shape.batch * self.shape.batches):
                tokens = random.integers(0, self.vocabulary, self.shape.length).astype(np.int32)
                writer.add([TokenizedDocument(i, tokens, np.ones(len(tokens), np.bool_))])
            writer.finish()
        return SequenceFile(self.folder / "corpus.arrow")

    def bare(self) -> None:
        """Compute the logits of every position with the model itself."""
        size, rows = self.shape.batch, len(self.sequences)
        with torch.no_grad():
            for start in range(0, rows, size):
                part = self.sequences.read(np.arange(start, start + size))
                inputs = model_inputs(part, "positions", self.model.dtype)
                inputs = {n: t.to(self.model.device) for n, t in inputs.items()}
                self.model(**inputs, use_cache=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def capture(self, capture: Capture) -> None:
        """Capture the same batches to a store: read, select, encode, compare, write and sync."""
        self.clear(capture)
        self.fill(capture)

    def clear(self, capture: Capture) -> None:
        """Start an empty store."""
        _, manifest = self._plan(capture)
        shutil.rmtree(self.store, ignore_errors=True)
        (self.store / SHARDS).mkdir(parents=True)
        (self.store / MANIFEST).write_bytes(json_bytes(manifest.to_json()))

    def fill(self, capture: Capture, report: Reporter = silent) -> None:
        """Capture the missing shards."""
        plan, manifest = self._plan(capture)
        forward = TeacherForward(self.teacher, capture, plan.batch_tokens, report)
        with ShardWriter(plan.folder, manifest, shared=True) as writer:
            capture_shards(plan, self.teacher, writer, forward, report, lambda: False)

    def _plan(self, capture: Capture) -> tuple[CapturePlan, Manifest]:
        shape, rows = self.shape, len(self.sequences)
        teacher = TeacherIdentity(
            name=shape.name, fingerprint="0", family=shape.family, dtype="float32", parameters=1,
            bytes=1,
        )  # fmt: skip
        settings = format_settings("compact", "arrow", self.vocabulary, capture)
        manifest = Manifest(
            teacher=teacher,
            tokenizer=TokenizerIdentity(fingerprint="0", size=self.vocabulary),
            corpus=CorpusIdentity(fingerprint="0", split="train", documents=rows),
            packing=Packing(
                sequence_length=shape.length, together=True, isolation="positions", separator=(),
                fingerprint="0",
            ),
            capture=capture,
            sequences=rows,
            shard_sequences=rows // self.shards,
            block_sequences=min(rows // self.shards, 32),
            codec=settings["codec"],
            store=settings["store"],
        )  # fmt: skip
        plan = CapturePlan(
            split="train", teacher=teacher, context=None, tokenizer=None, corpus=None,  # type: ignore[arg-type]
            sequences=self.sequences, rows=np.arange(rows), capture=capture,
            sequence_length=shape.length, shard_tokens=rows * shape.length // self.shards,
            batch_tokens=shape.batch * shape.length, codec="compact", store="arrow",
            folder=self.store,
        )  # fmt: skip
        return plan, manifest


def measure(shape: Shape, vocabulary: int) -> list[Figure]:
    """Measure one model with all captures."""
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        side = Side(shape, vocabulary, Path(folder))
        name = f"stage one against bare forward, {shape.name}, V={vocabulary:,}"
        figures += [
            compare_times(
                f"{name}, ({capture.head}, {capture.tail})",
                functools.partial(side.capture, capture),
                side.bare,
                repeats=3,
            )
            for capture in CAPTURES
        ]
        ours = functools.partial(side.capture, CAPTURES[-1])
        figures.append(compare_memory(name, ours, side.bare))
    return figures


def main() -> None:
    """Measure every shape and vocabulary."""
    torch.set_num_threads(2)
    figures: list[Figure] = []
    for shape in shapes():
        for vocabulary in shape.vocabularies:
            figures += measure(shape, vocabulary)
    write("teacher_forward", figures)


if __name__ == "__main__":
    main()
