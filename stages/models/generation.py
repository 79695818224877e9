"""Generation settings of a checkpoint that transformers would refuse to save again."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig

from ..libraries import first_line

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")
"""What generation must know; the rest is a matter of taste."""


def repair_generation(model: Any) -> str | None:
    """Make a model's generation settings ones that can be saved; what was left out, as a note.

    Published models have settings that do nothing together, such as a temperature without sampling.
    transformers loads them, and refuses to save them once anything else is changed: that would be
    found when the model is trained.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return None
    dropped: dict[str, Any] = {}
    reason = _refusal(settings)
    while reason is not None:
        named = [
            name
            for name in re.findall(r"`(\w+)`", reason)
            if name not in (*_KEPT[:2], "do_sample", *dropped)
            and getattr(settings, name, None) is not None
        ]
        if not named:
            kept = {name: getattr(settings, name) for name in _KEPT[:2]}
            model.generation_config = GenerationConfig(**kept)
            said = first_line(ValueError(reason))
            return (
                f"its generation_config.json is refused by transformers ({said}); only its special "
                "tokens are kept"
            )
        dropped[named[0]] = getattr(settings, named[0])
        setattr(settings, named[0], None)
        reason = _refusal(settings)
    if not dropped:
        return None
    listed = ", ".join(f"{name} = {value!r}" for name, value in dropped.items())
    return f"its generation_config.json has settings without effect, left out: {listed}"


def _refusal(settings: Any) -> str | None:
    """Why transformers would not save these settings; None if it would."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # a check of theirs may fail itself, on a value of another type
        return str(error) or type(error).__name__
    return None
