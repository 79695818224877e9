"""Fixtures of tests of captures: a prepared corpus and a saved teacher, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from small_runs import SmallCorpus, prepare, save_teacher

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    """The corpus of `small_runs`."""
    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


@pytest.fixture(scope="session")
def saved_teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with large logits, also in its padding rows."""
    return save_teacher(tmp_path_factory.mktemp("saved-teacher") / "model", tokenizer)
