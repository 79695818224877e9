"""Loading models and tokenizers from a folder or a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ...data.errors import ColdstillError
from ..libraries import first_line
from .device import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping


def load_tokenizer(name: str, where: str, revision: str = "main") -> Any:
    """The tokenizer of a folder or a hub name.

    Raises
        ColdstillError: there is none, or it is not a fast one (`where` names the recipe's key)
    """
    expect_present(name, where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises whatever its many loaders raise
        raise ColdstillError(
            f"{where}: no tokenizer in {searched(name)}: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise ColdstillError(
            f"{where}: the tokenizer of {name} is of a slow kind that cannot tell which characters "
            "a token covers; convert it to tokenizer.json"
        )
    return tokenizer


def load_model(
    name: str,
    where: str,
    *,
    precision: str,
    attention: str | None = None,
    revision: str = "main",
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model in evaluation mode, on the CPU unless `options` say where.

    precision  `fp32`, `bf16`, `fp16`, or `auto` for what the checkpoint says
    options    for `from_pretrained`

    Raises
        ColdstillError: there is no such model, or it is not a causal language model
    """
    expect_present(name, where)
    dtype = "auto" if precision == "auto" else DTYPES[precision]
    own = {} if attention is None else {"attn_implementation": attention}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision, **own, **(options or {})
        )
    except Exception as error:  # likewise
        raise ColdstillError(
            f"{where}: cannot load {searched(name)}: {first_line(error)}"
        ) from error
    return model.eval()


def context_length(config: Any) -> int | None:
    """The longest input a model takes, or None if its configuration does not say."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not length or length < 0:
        return None
    scaling = getattr(text, "rope_parameters", None) or {}
    # this kind begins to scale there, and goes on for `factor` times as long
    dynamic = scaling.get("rope_type") == "dynamic"
    return int(length * float(scaling.get("factor") or 1.0)) if dynamic else int(length)


def expect_present(name: str, where: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().is_dir() and "/" in name:
        raise ColdstillError(f"{where}: no folder {name}")


def searched(name: str) -> str:
    """Where a model was looked for: a misspelled folder reads like a name on the hub."""
    return name if Path(name).is_dir() else f"{name} (no folder here, so taken for one on a hub)"
