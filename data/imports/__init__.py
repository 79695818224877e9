"""Caches of other projects as stores: each format is one file and one line in `FORMATS`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .axolotl import Axolotl
from .distillkit import DistillKit
from .distillkit_legacy import DistillKitLegacy
from .hidden_states import HiddenStates
from .kld import Kld
from .maxtext import MaxText
from .megatron import Megatron
from .raw_rows import RawRows
from .vllm import Vllm

if TYPE_CHECKING:
    from .rows import Format

FORMATS: dict[str, type[Format] | Any] = {
    "distillkit": DistillKit,
    "distillkit-legacy": DistillKitLegacy,
    "raw": RawRows,
    "axolotl": Axolotl,
    "vllm": Vllm,
    "kld": Kld,
    "maxtext": MaxText,
    "megatron": Megatron,
    "hidden-states": HiddenStates,
}
