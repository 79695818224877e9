"""Fixtures of the tests of `inspect`, as a pytest plugin."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from inspected import desk_at, write_store

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Block
    from desk import Desk


@pytest.fixture(scope="session")
def _written_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Block]:
    root = tmp_path_factory.mktemp("inspected") / "s"
    return root, write_store(root)


@pytest.fixture
def block(_written_store: tuple[Path, Block]) -> Block:
    """The content of the store `s` of `alone`."""
    return _written_store[1]


@pytest.fixture
def alone(_written_store: tuple[Path, Block], tmp_path: Path) -> Desk:
    """A desk with a store `s` and nothing else."""
    shutil.copytree(_written_store[0], tmp_path / "s")
    return desk_at(tmp_path)
