"""Programs that run a teacher in place of transformers' own forward pass."""

from __future__ import annotations

from typing import Any

from ....data.store.manifest import EngineIdentity
from . import vllm

ENGINES = {vllm.NAME: vllm}
"""One entry per engine, by the name in the recipe. No engine is imported before it is started."""


def engine_identity(name: str, options: dict[str, Any]) -> EngineIdentity:
    """What a manifest says of an engine. Raises ColdstillError if it is not installed."""
    return EngineIdentity(name=name, version=ENGINES[name].installed_version(), options=options)
