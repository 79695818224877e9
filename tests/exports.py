"""Small students to export, and log-probabilities of runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from coldstill.stages.export import FORMATS
from coldstill.stages.export.contract import LoadedStudent
from coldstill.stages.models.vocabulary import without_padding
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.export.contract import Format, Runtime
    from numpy.typing import NDArray

PADDED = VOCABULARY + 16
LENGTH = 64
TOKENS = np.random.default_rng(3).integers(0, VOCABULARY, 40)
TEXTS = ("the teacher speaks once and  every student's listens\n\n\tfor 12345 as long",)
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SLIDING = _GROUPED | {"sliding_window": 24}
SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt_neox": {},
    "llama": _GROUPED,
    "llama-tied": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "gemma": _GROUPED | {"head_dim": 16},
    "mistral": _SLIDING,
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
}
"""Grouped key-value heads and windows shorter than `TOKENS`, so that their export matters."""


def small_student(family: str, tokenizer: Any, folder: Path, **settings: Any) -> LoadedStudent:
    """A student saved with a padded vocabulary. Its norms are not 1, and padding is probable.

    settings  override keys of its configuration
    """
    model = make_model(family, PADDED, **SETTINGS[family] | settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return LoadedStudent(
        name="small",
        folder=folder,
        model=without_padding(model, VOCABULARY),
        tokenizer=tokenizer,
        vocabulary=VOCABULARY,
        length=LENGTH,
        texts=TEXTS,
    )


def written(form: Format, student: LoadedStudent, folder: Path) -> Path:
    """An export in a new folder, with its base beside it."""
    folder.mkdir()
    base = None
    if form.base is not None:
        base = written(FORMATS[form.base], student, folder.with_name(f"{folder.name}-base"))
    form.write(student, folder, base)
    return folder


@torch.no_grad()
def student_logprobs(student: LoadedStudent, tokens_T: NDArray[Any] = TOKENS) -> torch.Tensor:
    """[T, V] of the student."""
    logits: torch.Tensor = student.model(torch.from_numpy(tokens_T)[None], use_cache=False).logits[
        0
    ]
    return logits.double().log_softmax(1)


def logprobs(
    runtime: Runtime, tokens_T: NDArray[Any] = TOKENS, vocabulary: int = VOCABULARY
) -> torch.Tensor:
    """[T, V] of an export in one pass."""
    return _normalised(runtime.step(tokens_T)[0], vocabulary)


def stepped_logprobs(
    runtime: Runtime,
    tokens_T: NDArray[Any] = TOKENS,
    first: int = 13,
    vocabulary: int = VOCABULARY,
) -> torch.Tensor:
    """[T, V] of an export with its cache, token by token after the first tokens."""
    part, cache = runtime.step(tokens_T[:first])
    parts = [np.array(part)]
    for place in range(first, len(tokens_T)):
        part, cache = runtime.step(tokens_T[place : place + 1], cache)
        parts.append(np.array(part))
    return _normalised(np.concatenate(parts), vocabulary)


def _normalised(logits_TV: NDArray[Any], vocabulary: int) -> torch.Tensor:
    assert logits_TV.shape[1] == vocabulary
    return torch.from_numpy(np.array(logits_TV)).double().log_softmax(1)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference of two log-probabilities."""
    return float((ours - theirs).abs().max())


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Mean KL(ours || theirs)."""
    return float((ours.exp() * (ours - theirs)).sum(1).mean())
