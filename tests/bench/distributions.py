"""Teachers whose distributions the store is measured on.

`trained`: the demo's teacher on its held-out documents, V = 4,096.
`synthetic`: V = 128,256 without the billions of weights. Its logits are the log of a Zipf law over
the vocabulary plus a product of low rank with a context of the last two tokens and a topic, as a
model's last layer has it, and it writes its own text, so that frequent contexts come again as they
do in real text. How sure it is varies with the context; the mean entropy is 2 nats.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.data.packing import TokenizedDocument, build_sequences
from coldstill.data.prepared import CorpusLayout
from coldstill.data.schema import Block, Capture
from coldstill.stages.models import load_model
from coldstill.stages.output_head import OutputHead
from coldstill.stages.selection import select, to_targets
from coldstill.stages.teacher_logits import capture_batch
from measure import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

POSITIONS = 16_384
_ZIPF, _SHIFT, _RANK, _PULL, _SURE, _SPREAD = 1.05, 2.7, 64, 3.2, 1.65, 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Records of one teacher under several captures, and what their noise is."""

    vocabulary: int
    blocks: dict[Capture, Block]
    entropy: float
    """Mean, in nats."""
    variance: dict[Capture, float]
    """Mean over positions of the variance that sampling adds to the gradient of KL with respect to
    the logits, summed over the vocabulary, as a share of that of 50 multinomial draws."""


def trained(captures: Sequence[Capture]) -> Measured:
    """The demo's teacher, which is trained if it is not there yet (about two minutes)."""
    run = OUTPUT / "demo"
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", "demo"]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    model: Any = load_model(str(run / "teacher" / "model"), "teacher", precision="fp32")
    vocabulary = 4096
    head = OutputHead(model, vocabulary)
    file = CorpusLayout(run / "corpus").open("heldout")
    sequences = file.read(np.arange(min(len(file), POSITIONS // 256 + 2)))
    blocks = {}
    for capture in captures:
        buffer = head.buffer(4096, model.device)
        parts = []
        for start in range(0, len(sequences), 16):
            part = sequences.take(np.arange(start, min(start + 16, len(sequences))))
            targets = capture_batch(head, part, "positions", capture, buffer)
            parts.append(Block(sequences=part, targets=targets, capture=capture))
        blocks[capture] = Block.concatenate(parts)
    entropy = float(blocks[captures[0]].targets.entropy.mean())
    return Measured(vocabulary=vocabulary, blocks=blocks, entropy=entropy, variance={})


@torch.no_grad()
def synthetic(captures: Sequence[Capture], *, documents: int = 16, seed: int = 0) -> Measured:
    """16 documents that the teacher writes itself, token by token."""
    vocabulary, length = 128_256, POSITIONS // documents
    random = torch.Generator().manual_seed(seed)
    rank = torch.arange(vocabulary) + 1.0
    prior = -_ZIPF * torch.log(rank + _SHIFT)
    # ids in the order of frequency but for some noise, as the order of merges makes them
    prior = prior[torch.argsort(torch.log(rank) + 0.7 * torch.randn(vocabulary, generator=random))]
    output = torch.randn(_RANK, vocabulary, generator=random)
    embedding = torch.randn(vocabulary, _RANK, generator=random)
    topic = torch.randn(documents, _RANK, generator=random)
    last = before = torch.multinomial(prior.softmax(0), documents, generator=random)
    text = [last]
    parts: dict[Capture, list[Any]] = {capture: [] for capture in captures}
    noise = dict.fromkeys(captures, 0.0)
    multinomial = 0.0
    for _ in range(length - 1):
        context = embedding[last] + 0.6 * embedding[before] + 0.6 * topic
        context /= context.norm(dim=1, keepdim=True)
        sure = _SURE * torch.exp(_SPREAD * context[:, :1] * _RANK**0.5)
        logits = ((context * _PULL) @ output + prior) * sure
        probs = logits.softmax(1)
        drawn = torch.multinomial(probs, 1, generator=random)[:, 0]
        multinomial += float((1 - (probs.double() ** 2).sum(1)).sum() / 50)
        for capture in captures:
            shift = torch.rand(documents, generator=random, dtype=torch.float64)
            selected = list(select(logits.clone(), drawn, shift, capture))
            parts[capture] += selected
            if capture.tail:
                noise[capture] += _variance(probs, selected[0].head_ids, capture.tail)
        before, last = last, drawn
        text.append(drawn)
    tokens = torch.stack(text, 1).numpy().astype(np.int32)
    blocks = {c: _block(tokens, parts[c], c) for c in captures}
    entropy = float(blocks[captures[0]].targets.entropy.mean())
    variance = {c: noise[c] / multinomial for c in captures if c.tail}
    return Measured(vocabulary=vocabulary, blocks=blocks, entropy=entropy, variance=variance)


def _variance(probs_BV: torch.Tensor, head_BK: torch.Tensor, samples: int) -> float:
    """Sum over positions and tokens of the variance of a systematic sample's weights.

    A token of which `f` samples are expected gets floor(f) or ceil(f), with mean f.
    """
    rest = probs_BV.double().scatter(1, head_BK, 0.0)
    weight = rest.sum(1, keepdim=True) / samples
    fraction = (rest / weight.clamp(min=1e-300)) % 1.0
    return float((weight**2 * fraction * (1 - fraction)).sum())


def _block(tokens_BT: NDArray[np.int32], parts: list[Any], capture: Capture) -> Block:
    documents, length = tokens_BT.shape
    sequences = build_sequences(
        0,
        [
            [TokenizedDocument(i, tokens, np.ones(length, np.bool_))]
            for i, tokens in enumerate(tokens_BT)
        ],
    )
    # captured step by step over all documents; a block goes document by document
    order = np.arange(documents * (length - 1)).reshape(length - 1, documents).T.ravel()
    targets = to_targets(parts, capture).take(order)
    return Block(sequences=sequences, targets=targets, capture=capture)
