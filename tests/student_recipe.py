"""A recipe with one student that lacks an origin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.reading import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.pipeline.recipe.tables import StudentTable

ORIGIN = "architecture = { layers = 1, hidden = 32, heads = 2 }"
RECIPE = """\
name = "r"
corpus = { files = ["t"] }
teacher = { model = "x/y" }
[students.small]
train = { steps = 5 }
"""


def load(folder: Path, text: str, *settings: str) -> dict[str, StudentTable]:
    path = folder / "r.toml"
    path.write_text(RECIPE + text, encoding="utf-8")
    return load_recipe(str(path), settings).recipe.students


def fault(folder: Path, text: str) -> str:
    with pytest.raises(ColdstillError) as error:
        load(folder, text)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")
