"""Teachers whose distributions the benchmarks of the store use.

`trained` is the demo's teacher on its held-out documents, V = 4,096.
`synthetic` has V = 128,256 without billions of weights. Its logits are the log of a Zipf law over
the vocabulary plus a low-rank product with a context of the last two tokens and a topic, like a
model's last layer. It writes its own text, so frequent contexts repeat as in real text. Its
confidence varies with the context; the mean entropy is 2 nats.
`real` is SmolLM2-135M-Instruct on the held-out texts of `make bench-quality TEACHER=smollm2`, which
must have run before; otherwise it is left out.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.alignment import labels
from coldstill.data.order import uniform
from coldstill.data.prepared import CorpusLayout, TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture, Sequences
from coldstill.stages.capture.selection import select
from coldstill.stages.models.inputs import flat_positions, model_inputs
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import OutputHead
from coldstill.stages.targets.tensors import TargetTensors, tempered
from measure import OUTPUT
from real_teacher import REAL_RUN, teacher_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

POSITIONS = 16_384
_ZIPF, _SHIFT, _RANK, _PULL, _SURE, _SPREAD = 1.05, 2.7, 64, 3.2, 1.65, 0.35
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Some positions, as input of the selection."""

    hidden: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor
    uniform: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reading:
    """A teacher's hidden states on some text; the logits `[M, V]` are computed when needed."""

    sequences: Sequences
    hidden_MD: torch.Tensor
    weight_VD: torch.Tensor

    def chunks(self) -> Iterator[Chunk]:
        """All positions in order, in chunks."""
        labels_M = torch.from_numpy(labels(self.sequences).astype(np.int64))
        ids_M = np.repeat(self.sequences.ids, self.sequences.positions.lengths)
        uniform_M = torch.from_numpy(uniform(0, ids_M, self.sequences.positions.values))
        rows = max(1, _CHUNK_ELEMENTS // len(self.weight_VD))
        for start in range(0, len(labels_M), rows):
            part = slice(start, start + rows)
            hidden = self.hidden_MD[part]
            yield Chunk(
                hidden=hidden,
                logits=hidden @ self.weight_VD.t(),
                labels=labels_M[part],
                uniform=uniform_M[part],
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Records of one teacher for several captures, and their sampling noise."""

    vocabulary: int
    blocks: dict[Capture, Block]
    entropy: float
    """Mean entropy in nats."""
    variance: dict[Capture, float]
    """Mean over positions of the squared error that sampling adds to the gradient of KL with
    respect to the logits, as a share of the variance of 50 multinomial draws."""


def readings() -> list[Reading]:
    """The trained and the synthetic teacher, and the real one if its texts are here."""
    real = real_reading()
    if real is None:
        print("without the real teacher: run make bench-quality TEACHER=smollm2 first")
    return [each for each in (trained_reading(), synthetic_reading(), real) if each is not None]


@torch.no_grad()
def measured(reading: Reading, captures: Sequence[Capture]) -> Measured:
    """Select targets for every capture."""
    parts: dict[Capture, list[Any]] = {capture: [] for capture in captures}
    noise = dict.fromkeys(captures, 0.0)
    multinomial = 0.0
    for chunk in reading.chunks():
        probs_MV = chunk.logits.softmax(1)
        squares_M = torch.linalg.vecdot(probs_MV, probs_MV)
        multinomial += float((1 - squares_M).double().sum() / 50)
        for capture in captures:
            selected = list(select(chunk.logits, chunk.labels, chunk.uniform, capture))
            parts[capture] += selected
            if capture.tail:
                noise[capture] += _noise(probs_MV, squares_M, selected)
    blocks = {
        capture: Block(
            sequences=reading.sequences,
            targets=TargetTensors.concatenate(parts[capture]).to_targets(),
            capture=capture,
        )
        for capture in captures
    }
    return Measured(
        vocabulary=len(reading.weight_VD),
        blocks=blocks,
        entropy=float(blocks[captures[0]].targets.entropy.mean()),
        variance={c: noise[c] / multinomial for c in captures if c.tail},
    )


@functools.cache
def trained_reading() -> Reading:
    """The demo's teacher; it is trained first if it is missing (about two minutes)."""
    run = OUTPUT / "demo"
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "train-teacher", "demo"]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    return _read(str(run / "teacher" / "model"), run, 4096)


@functools.cache
def real_reading() -> Reading | None:
    """SmolLM2 on the held-out texts of its run; None without them."""
    run = OUTPUT / REAL_RUN
    if not (run / "heldout").exists():
        return None
    return _read(teacher_weights().name, run, 49_152)


@torch.no_grad()
def _read(folder: str, run: Path, vocabulary: int) -> Reading:
    """A model's states on the first held-out sequences of a run."""
    head = OutputHead(load_model(folder, "teacher", precision="fp32"), vocabulary)
    file = CorpusLayout(run / "corpus").open("heldout")
    sequences = file.read(np.arange(min(len(file), POSITIONS // 256 + 2)))
    hidden = []
    for start in range(0, len(sequences), 16):
        part = sequences.take(np.arange(start, min(start + 16, len(sequences))))
        inputs = model_inputs(part, "positions", head.model.dtype)
        positions = flat_positions(part, inputs["input_ids"].shape[1])
        hidden.append(head.hidden(inputs).flatten(0, 1)[positions])
    weight = head.real_weight(torch.float32)
    assert weight is not None
    return Reading(sequences=sequences, hidden_MD=torch.cat(hidden), weight_VD=weight)


@functools.cache
@torch.no_grad()
def synthetic_reading(*, documents: int = 16, seed: int = 0) -> Reading:
    """16 documents that the teacher writes token by token."""
    vocabulary, length = 128_256, POSITIONS // documents
    random = torch.Generator().manual_seed(seed)
    rank = torch.arange(vocabulary) + 1.0
    prior = -_ZIPF * torch.log(rank + _SHIFT)
    # ids in the order of frequency with some noise, as merges of a tokenizer have
    prior = prior[torch.argsort(torch.log(rank) + 0.7 * torch.randn(vocabulary, generator=random))]
    output = torch.randn(_RANK, vocabulary, generator=random)
    weight_VD = torch.cat([output, prior[None]]).t().contiguous()
    embedding = torch.randn(vocabulary, _RANK, generator=random)
    topic = torch.randn(documents, _RANK, generator=random)
    last = before = torch.multinomial(prior.softmax(0), documents, generator=random)
    text, hidden = [last], []
    for _ in range(length - 1):
        context = embedding[last] + 0.6 * embedding[before] + 0.6 * topic
        context /= context.norm(dim=1, keepdim=True)
        sure = _SURE * torch.exp(_SPREAD * context[:, :1] * _RANK**0.5)
        hidden.append(torch.cat([context * _PULL * sure, sure], 1))
        probs = (hidden[-1] @ weight_VD.t()).softmax(1)
        before, last = last, torch.multinomial(probs, 1, generator=random)[:, 0]
        text.append(last)
    tokens = torch.stack(text, 1).numpy().astype(np.int32)
    rows = [
        [TokenizedDocument(i, document, np.ones(length, np.bool_))]
        for i, document in enumerate(tokens)
    ]
    return Reading(
        sequences=build_sequences(0, rows),
        hidden_MD=torch.stack(hidden, 1).flatten(0, 1),
        weight_VD=weight_VD,
    )


def _noise(
    probs_MV: torch.Tensor, squares_M: torch.Tensor, selected: Sequence[TargetTensors]
) -> float:
    """Squared distance of the samples' weights from the tail, summed over positions.

    squares_M  sums of the squared probabilities
    """
    target = TargetTensors.concatenate(selected)
    tail = target.tail
    weight_J = tempered(target, 1.0).tail
    outside_M = squares_M - probs_MV.gather(1, target.head_ids).square().sum(1)
    at_tail = weight_J * (weight_J - 2 * probs_MV[tail.rows(), tail.ids])
    return float(outside_M.double().sum() + at_tail.double().sum())
