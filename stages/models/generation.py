"""Repairing generation settings that transformers loads but refuses to save."""

from __future__ import annotations

import re
from typing import Any

from transformers import GenerationConfig

from ...data.errors import first_line

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_length")
"""Settings that are kept; the others are only defaults for sampling."""


def repair_generation(model: Any) -> str | None:
    """Remove generation settings that cannot be saved; returns a note that lists them.

    Published models have settings that contradict each other, such as a temperature without
    sampling. transformers loads them, but refuses to save them after any other change. Without the
    repair this error would appear only after training.
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
            return (
                "transformers refuses its generation_config.json "
                f"({first_line(ValueError(reason))}); only its special tokens are kept"
            )
        dropped[named[0]] = getattr(settings, named[0])
        setattr(settings, named[0], None)
        reason = _refusal(settings)
    if not dropped:
        return None
    listed = ", ".join(f"{name} = {value!r}" for name, value in dropped.items())
    return f"its generation_config.json has settings without effect, left out: {listed}"


def _refusal(settings: Any) -> str | None:
    """Why transformers would refuse to save these settings; None if it would save them."""
    try:
        settings.validate(strict=True)
    except Exception as error:  # the check itself may fail on a value of another type
        return str(error) or type(error).__name__
    return None
