"""A fixture without network, for tests of code that must not use one."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every connection fails; the cache of `datasets` is beside the test's own files."""
    import datasets

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cache = tmp_path.with_name(f"{tmp_path.name}.datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
