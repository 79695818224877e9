"""What is said of a model, figure by figure: the columns of the two tables, for every output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..pages.charts import short
from ..units import size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Row = dict[str, Any]

CACHED_BYTES = "cached_bytes_per_position"
"""Of the stores that a student was trained from: a key of its figures beside the measured ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A figure of models."""

    key: str
    title: str
    value: Callable[[Row], Any]
    """None where it is not known."""
    told: Callable[[Any], str]
    group: str = ""
    """What it shares with its neighbours, told above their titles."""
    better: Literal["less", "more", ""] = ""
    of: Literal["model", "text", "machine"] = "model"
    """With which it changes: figures compare where that is the same."""
    missing: str = ""
    """Why it may not be known, for the note below a table that has a `-` there."""

    def cell(self, row: Row) -> str:
        """The figure as text; `-` where it is not known."""
        value = self.value(row)
        return "-" if value is None else self.told(value)


def speed_of(row: Mapping[str, Any], batch: int = 1) -> Mapping[str, Any]:
    """What was measured of writing that many texts at once; empty if it was not."""
    found: Mapping[str, Any] = next(
        (one for one in row.get("generation") or () if one.get("batch") == batch), {}
    )
    return found


def short_name(row: Mapping[str, Any]) -> str:
    """What a model is called where its place says the rest: of an export its format."""
    return str(row["format"] if row.get("role") == "export" else row["name"])


def indented(row: Row) -> str:
    """Likewise, an export a step to the right."""
    return ("  " if row.get("role") == "export" else "") + short_name(row)


def _figure(key: str) -> Callable[[Row], Any]:
    return lambda row: row.get(key)


def _measured(key: str) -> Callable[[Row], Any]:
    """A figure of which 0 says that it was too little to be measured."""
    return lambda row: row.get(key) or None


def _speed(key: str, batch: int = 1) -> Callable[[Row], Any]:
    return lambda row: speed_of(row, batch).get(key) or None


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def nats(value: float) -> str:
    """A figure in nats; what rounds to nothing is 0, without a sign."""
    return f"{value:z.4f}"


def _share(value: float) -> str:
    return f"{value:z.1%}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"


def _cached(value: float) -> str:
    return f"{value:.1f} B" if value else "0 B"


NAME = Column(key="name", title="model", value=lambda row: row, told=indented)
QUALITY = (
    NAME,
    Column(key="parameters", title="parameters", value=_figure("parameters"), told=_whole,
           better="less"),
    Column(key=CACHED_BYTES, title="cached", value=_figure(CACHED_BYTES), told=_cached,
           better="less", missing="only what was trained from a store has read one"),
    Column(key="loss", title="loss", value=_figure("loss"), told=nats, better="less", of="text"),
    Column(key="perplexity", title="perplexity", value=_figure("perplexity"), told="{:.2f}".format,
           better="less", of="text"),
    Column(key="bits_per_byte", title="bits/byte", value=_figure("bits_per_byte"), told=nats,
           better="less", of="text",
           missing="the held-out store does not tell how many bytes its text has"),
    Column(key="kl", title="KL", value=_figure("kl"), told=nats, better="less", of="text"),
    Column(key="agreement", title="agreement", value=_figure("agreement"), told=_share,
           better="more", of="text"),
    Column(key="acceptance", title="acceptance", value=_figure("acceptance"), told=_share,
           better="more", of="text"),
    Column(key="ece", title="ECE", value=_figure("ece"), told=_share, better="less", of="text"),
)  # fmt: skip
"""How good a model is."""


_NEWER = "it was evaluated by an older version; delete evaluation.json and evaluate again"
_UNTIMED = (
    "it was not timed at that size of batch: it keeps no cache of keys and values, its texts are "
    "too short, or its own runtime is not here"
)


def _timed(key: str, title: str, better: Literal["less", "more"], batch: int = 1) -> Column:
    return Column(
        key=f"{key}_{batch}",
        title=title,
        value=_speed(key, batch),
        told=_milliseconds if key.endswith(("seconds", "p95")) else _whole,
        group=f"batch {batch}",
        better=better,
        of="machine",
        missing=_UNTIMED,
    )


COST = (
    NAME,
    Column(key="dtype", title="precision", value=_figure("dtype"), told=str,
           missing=_NEWER),
    Column(key="bytes", title="size", value=_measured("bytes"), told=size, better="less",
           missing=_NEWER),
    Column(key="flops_per_token", title="FLOPs", value=_measured("flops_per_token"),
           told=short, better="less",
           missing="the arithmetic of the model could not be counted"),
    _timed("prefill_tokens_per_second", "prompt/s", "more"),
    _timed("first_token_seconds", "first ms", "less"),
    _timed("token_seconds", "ms/token", "less"),
    _timed("token_seconds_p95", "p95", "less"),
    Column(key="memory_bytes", title="memory", value=_speed("memory_bytes"), told=size,
           group="batch 1", better="less", of="machine",
           missing="it was not timed, or took too little to be measured"),
    _timed("token_seconds", "ms/token", "less", batch=8),
    _timed("token_seconds_p95", "p95", "less", batch=8),
    _timed("decode_tokens_per_second", "tokens/s", "more", batch=8),
)  # fmt: skip
"""What it costs to run it."""


def groups_of(columns: tuple[Column, ...]) -> list[tuple[str, int]]:
    """What neighbouring columns share and how many these are, in order."""
    found: list[tuple[str, int]] = []
    for column in columns:
        if found and found[-1][0] == column.group:
            found[-1] = (column.group, found[-1][1] + 1)
        else:
            found.append((column.group, 1))
    return found
