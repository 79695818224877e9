"""Settings of pruning. Nothing heavy is imported here, as in `stages/config.py`."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ...config import InRecipe

_Count = Annotated[int, Field(ge=1, strict=True)]
"""A number of parts. Strict, since `true` would otherwise count as 1."""
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def _budget(value: Any) -> Any:
    """Check `parameters`; one message covers all wrong values."""
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
    """Sizes of the pruned teacher, a number of parameters, or both. Unset sizes stay as they are;
    with `parameters` they are chosen."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}
    layers: _Count | None = None
    """Number of layers that are kept."""
    hidden: _Count | None = None
    """Width of the residual stream after pruning."""
    feed_forward: _Count | None = None
    """Number of neurons that each feed-forward layer keeps."""
    heads: _Count | None = None
    """Number of query heads that each layer keeps, equally many in each key-value group."""
    kv_heads: _Count | None = None
    """Number of key-value heads that each layer keeps, each with the query heads of its group."""
    parameters: Annotated[
        int | str | None,
        BeforeValidator(_budget),
        InRecipe('integer at least 1, or share such as "50%"'),
    ] = None
    """Most parameters after pruning: a number, or a share of the teacher's such as "50%". Unset
    sizes are chosen: hidden and feed_forward shrink together, and layers are removed once these are
    down to a quarter."""
    layers_by: Literal["influence", "loss"] = "influence"
    """How the importance of a layer is measured: `influence` is the angle by which it turns the
    residual stream, `loss` is the loss without it. `loss` removes one layer after another and needs
    a pass over the sample for each remaining layer each time; it chooses better if several layers
    are removed."""
    sequences: _Count = 128
    """Number of sequences of the store on which importance is measured: a seeded sample, or all."""

    def __post_init__(self) -> None:
        if not self.given and self.parameters is None:
            raise ValueError(
                "needs sizes such as { hidden = 512, feed_forward = 1536 }, or parameters, such as "
                '{ parameters = "50%" }'
            )

    @property
    def given(self) -> dict[str, int]:
        """The sizes that are set, by name."""
        names = ("layers", "hidden", "feed_forward", "heads", "kv_heads")
        asked = {name: getattr(self, name) for name in names}
        return {name: size for name, size in asked.items() if size is not None}

    def budget(self, teacher: int) -> int | None:
        """Return the most parameters after pruning a teacher with `teacher` parameters."""
        if not isinstance(self.parameters, str):
            return self.parameters
        share = _SHARE.fullmatch(self.parameters.strip())
        assert share is not None  # otherwise it was refused when the recipe was read
        return int(Fraction(share[1]) * teacher / 100)


def listed_cuts(value: Any) -> Any:
    """Return a single table as a list of one table."""
    if isinstance(value, dict | PruneConfig):
        return [value]
    if value is not None and not (isinstance(value, list | tuple) and value):
        raise ValueError(
            f'{value!r} is neither a table such as {{ parameters = "50%" }} nor a list of them'
        )
    return value


def plain_cuts(value: tuple[PruneConfig, ...] | None) -> Any:
    """Return a list of one table as that table, for the record of a run."""
    if value is None:
        return None
    return asdict(value[0]) if len(value) == 1 else [asdict(cut) for cut in value]
