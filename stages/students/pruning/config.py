"""What a recipe says of pruning. Nothing heavy is imported here, as in `stages/config.py`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

_Count = Annotated[int, Field(ge=1, strict=True)]
"""Of parts. Nothing that could be taken for one: `true` layers are a slip."""
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def _budget(value: Any) -> Any:
    """What may stand for a number of parameters; one message for all that may not."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    share = _SHARE.fullmatch(value.strip()) if isinstance(value, str) else None
    if share is not None and 0 < Fraction(share[1]) <= 100:
        return value
    raise ValueError(
        f"{value!r} is neither a number of parameters nor a share of the teacher's, such as '50%'"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneConfig:
    """How much of the teacher a student begins with: sizes, a number of parameters, or both. What
    is not said stays as it is or, with `parameters`, is chosen."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    layers: _Count | None = None
    """How many are kept."""
    hidden: _Count | None = None
    """Width of the residual stream that is kept."""
    feed_forward: _Count | None = None
    """Neurons that each feed-forward layer keeps."""
    heads: _Count | None = None
    """Query heads that each layer keeps, as many of every key-value head's group."""
    kv_heads: _Count | None = None
    """Key-value heads that each layer keeps, each with the query heads of its group."""
    parameters: Annotated[int | str | None, BeforeValidator(_budget)] = None
    """At most so many are left: a number, or a share of the teacher's such as "50%". Sizes that are
    not given are chosen: hidden and feed_forward shrink together, layers go when a quarter of these
    is left."""
    layers_by: Literal["influence", "loss"] = "influence"
    """What a layer is judged by: how much it turns the residual stream, or the loss without it.
    By the loss layers go one after another, which takes, for each that goes, a pass over the sample
    for each that is still there; the choice is better where more than one goes."""
    sequences: _Count = 1024
    """How many of the store's sequences importance is measured on: a seeded sample, or all."""

    def __post_init__(self) -> None:
        if not self.given and self.parameters is None:
            raise ValueError(
                "needs sizes such as { hidden = 512, feed_forward = 1536 }, or parameters, such as "
                '{ parameters = "50%" }'
            )

    @property
    def given(self) -> dict[str, int]:
        """The sizes that are asked for, by name."""
        names = ("layers", "hidden", "feed_forward", "heads", "kv_heads")
        asked = {name: getattr(self, name) for name in names}
        return {name: size for name, size in asked.items() if size is not None}

    def budget(self, teacher: int) -> int | None:
        """The most parameters that may be left, of a teacher with so many."""
        if not isinstance(self.parameters, str):
            return self.parameters
        share = _SHARE.fullmatch(self.parameters.strip())
        assert share is not None  # or it would have been refused
        return int(Fraction(share[1]) * teacher / 100)


def listed_cuts(value: Any) -> Any:
    """A single table as the list of one that it is short for."""
    if isinstance(value, dict | PruneConfig):
        return [value]
    if value is not None and not (isinstance(value, list | tuple) and value):
        raise ValueError(
            f'{value!r} is neither a table such as {{ parameters = "50%" }} nor a list of them'
        )
    return value


def plain_cuts(value: tuple[PruneConfig, ...] | None) -> Any:
    """And back, for the record of a run."""
    if value is None:
        return None
    return asdict(value[0]) if len(value) == 1 else [asdict(cut) for cut in value]
