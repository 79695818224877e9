"""Programs that run a teacher in place of transformers' own forward pass."""

from __future__ import annotations

from typing import Any

from ....data.store.manifest import EngineIdentity
from . import vllm

ENGINES = {vllm.NAME: vllm}
"""One module per engine, by the name in the recipe: `installed_version`, `expect_installed` and the
class `started`. No engine is imported before it is started."""


def engine_identity(name: str, options: dict[str, Any]) -> EngineIdentity:
    """What a manifest says of an engine; the version is empty if it is not installed, which is
    refused when it starts."""
    return EngineIdentity(name=name, version=ENGINES[name].installed_version(), options=options)
