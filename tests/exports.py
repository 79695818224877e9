"""Small students to export, and what a runtime says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.stages.export.contract import Source
from conftest import FAMILIES, VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.export.contract import Format, Runtime
    from numpy.typing import NDArray

PADDED = VOCABULARY + 16
LENGTH = 64
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 40)
TEXTS = ("the teacher speaks once and  every student's listens\n\n\tfor 12345 as long",)
MORE = {"qwen2": {}, "gemma": {"head_dim": 16}}
"""Families that llama.cpp knows and the other tests do not ask."""


def source_of(family: str, tokenizer: Any, folder: Path) -> Source:
    """A student of a family, its vocabulary padded, saved; its norms are not all one."""
    FAMILIES.update({name: MORE[name] for name in MORE if name == family})
    try:
        model = make_model(family, PADDED)
    finally:
        for name in MORE:
            FAMILIES.pop(name, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Source(
        name="small",
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        vocabulary=VOCABULARY,
        length=LENGTH,
        texts=TEXTS,
        card="# a page\n",
    )


def written(form: Format, source: Source, folder: Path) -> Path:
    """An export in a new folder."""
    folder.mkdir()
    form.write(source, folder)
    return folder


@torch.no_grad()
def student_logprobs(source: Source) -> torch.Tensor:
    """[T, V] what the student says of `TOKENS`."""
    logits: torch.Tensor = source.model(torch.from_numpy(TOKENS)[None], use_cache=False).logits[0]
    return logits[:, :VOCABULARY].double().log_softmax(1)


def logprobs(runtime: Runtime, tokens_T: NDArray[Any] = TOKENS) -> torch.Tensor:
    """[T, V] what an export says, all at once."""
    return _normalised(runtime.step(tokens_T)[0])


def stepped_logprobs(runtime: Runtime, first: int = 13) -> torch.Tensor:
    """The same token by token after the first few, with the cache."""
    part, cache = runtime.step(TOKENS[:first])
    parts = [np.array(part)]
    for place in range(first, len(TOKENS)):
        part, cache = runtime.step(TOKENS[place : place + 1], cache)
        parts.append(np.array(part))
    return _normalised(np.concatenate(parts))


def _normalised(logits_TV: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(logits_TV[:, :VOCABULARY])).double().log_softmax(1)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest, of two log-probabilities."""
    return float((ours - theirs).abs().max())


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL(ours || theirs)."""
    return float((ours.exp() * (ours - theirs)).sum(1).mean())
