"""The columns of the two tables of models: how good each model is and what it costs to run."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from ..units import short, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from .figures import ModelFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One figure of all models."""

    key: str
    title: str
    value: Callable[[ModelFigures], Any]
    """The figure of a model; None where it is not known."""
    text: Callable[[Any], str]
    """The figure as it is shown."""
    group: str = ""
    """Title above those of neighbouring columns."""
    better: Literal["less", "more", ""] = ""
    depends_on: Literal["model", "text", "machine"] = "model"
    """Figures compare only where this is the same."""
    missing: str = ""
    """Reason why a figure can be unknown, for the note below a table."""

    def cell(self, row: ModelFigures) -> str:
        """The figure as text; `-` where it is not known."""
        value = self.value(row)
        return "-" if value is None else self.text(value)


def _measured(key: str) -> Callable[[ModelFigures], Any]:
    """A figure whose 0 means that it was too small to be measured."""
    return lambda row: getattr(row, key) or None


def _speed(key: str, batch: int = 1) -> Callable[[ModelFigures], Any]:
    return lambda row: getattr(row.speed(batch), key, None) or None


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _nats(value: float) -> str:
    return f"{value:z.4f}"


def _share(value: float) -> str:
    return f"{value:z.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _cached(value: float) -> str:
    return f"{value:.1f} B" if value else "0 B"


def _figure(
    key: str,
    title: str,
    text: Callable[[Any], str],
    better: Literal["less", "more"] = "less",
    depends_on: Literal["model", "text"] = "text",
    missing: str = "",
) -> Column:
    return Column(
        key=key,
        title=title,
        value=attrgetter(key),
        text=text,
        better=better,
        depends_on=depends_on,
        missing=missing,
    )


CACHED = _figure(
    "cached_bytes_per_position", "cached", _cached, depends_on="model",
    missing="only a student that was trained from a store has read one",
)  # fmt: skip
QUALITY = (
    _figure("parameters", "parameters", _whole, depends_on="model"),
    CACHED,
    _figure("loss", "loss", _nats),
    _figure("perplexity", "perplexity", "{:.2f}".format),
    _figure("bits_per_byte", "bits/byte", _nats,
            missing="the held-out store does not tell how many bytes its text has"),
    _figure("kl", "KL", _nats),
    _figure("agreement", "agreement", _share, "more"),
    _figure("acceptance", "acceptance", _share, "more"),
    _figure("ece", "ECE", _share),
)  # fmt: skip
"""How good a model is; each table begins with a column of names."""


_OLD = "it was evaluated by an older version; delete evaluation.json and evaluate again"
_UNTIMED = (
    "it was not timed at that batch size: it has no key-value cache, its texts are too short, or "
    "its runtime is not installed"
)


def _timed(key: str, title: str, better: Literal["less", "more"], batch: int = 1) -> Column:
    return Column(
        key=f"{key}_{batch}",
        title=title,
        value=_speed(key, batch),
        text=_milliseconds if key.endswith(("seconds", "p95")) else _whole,
        group=f"batch {batch}",
        better=better,
        depends_on="machine",
        missing=_UNTIMED,
    )


COST = (
    Column(key="dtype", title="precision", value=_measured("dtype"), text=str, missing=_OLD),
    Column(key="bytes", title="size", value=_measured("bytes"), text=size, better="less",
           missing=_OLD),
    Column(key="flops_per_token", title="FLOPs", value=_measured("flops_per_token"),
           text=short, better="less",
           missing="the operations of the model could not be counted"),
    _timed("prefill_tokens_per_second", "prompt/s", "more"),
    _timed("first_token_seconds", "first ms", "less"),
    _timed("token_seconds", "ms/token", "less"),
    _timed("token_seconds_p95", "p95", "less"),
    Column(key="memory_bytes", title="memory", value=_speed("memory_bytes"), text=size,
           group="batch 1", better="less", depends_on="machine",
           missing="it was not timed, or took too little to be measured"),
    _timed("token_seconds", "ms/token", "less", batch=8),
    _timed("token_seconds_p95", "p95", "less", batch=8),
    _timed("decode_tokens_per_second", "tokens/s", "more", batch=8),
)  # fmt: skip
"""What it costs to run a model."""


def groups_of(columns: tuple[Column, ...]) -> list[tuple[str, int]]:
    """The groups of neighbouring columns and how many columns each has, in order."""
    found: list[tuple[str, int]] = []
    for column in columns:
        if found and found[-1][0] == column.group:
            found[-1] = (column.group, found[-1][1] + 1)
        else:
            found.append((column.group, 1))
    return found
