"""Reads the parameters of a codec from the table that `--config` names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError
from .bits import SIZES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .rows import Context


def parameters(
    context: Context, name: str, section: str, needed: tuple[str, ...]
) -> Mapping[str, Any]:
    """The table of a codec: the whole configuration, or its part `section` at any depth. Raises
    ColdstillError if it lacks one of the `needed` keys."""
    table = context.config
    if not table:
        raise ColdstillError(
            f"--format {name}: the bytes mean nothing without the parameters of the codec; name "
            "their file with --config"
        )
    table = _inside(table, (section, "legacy_logit_compression")) or table
    if missing := [key for key in needed if key not in table]:
        raise ColdstillError(
            f"--config: has no {missing[0]}; it has {', '.join(map(str, table)) or 'nothing'}"
        )
    return table


def _inside(table: Mapping[str, Any], sections: tuple[str, ...]) -> Mapping[str, Any] | None:
    """The first part of a configuration with one of these names, at any depth."""
    for key, value in table.items():
        if isinstance(value, dict):
            if key in sections:
                return value
            if (found := _inside(value, sections)) is not None:
                return found
    return None


def whole_number(table: Mapping[str, Any], key: str, least: int, most: int) -> int:
    value = table.get(key)
    if type(value) is not int or not least <= value <= most:
        raise ColdstillError(
            f"--config: {key} = {value!r:.40}: expected a whole number from {least} to {most:,}"
        )
    return value


def flag(table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if type(value) is not bool:
        raise ColdstillError(f"--config: {key} = {value!r:.40}: expected true or false")
    return value


def dtype_name(table: Mapping[str, Any], key: str, default: str) -> str:
    value = str(table.get(key, default)).removeprefix("torch.")
    if value not in SIZES:
        raise ColdstillError(f"--config: {key} = {value!r:.40}: expected {', '.join(SIZES)}")
    return value
