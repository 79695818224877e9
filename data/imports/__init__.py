"""Caches of other projects as stores: each format is one file and one line in `FORMATS`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ColdstillError
from .axolotl import Axolotl
from .distillkit import DistillKit
from .distillkit_legacy import DistillKitLegacy
from .files import TABLES, columns_of, source_files
from .raw_rows import RawRows
from .vllm import Vllm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .files import SourceFile
    from .rows import Format

FORMATS: dict[str, type[Format]] = {
    "distillkit": DistillKit,
    "distillkit-legacy": DistillKitLegacy,
    "raw": RawRows,
    "axolotl": Axolotl,
    "vllm": Vllm,
}
