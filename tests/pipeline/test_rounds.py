"""Rounds on the command line: who acts, what is written, and what is refused."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from small_runs import save_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

ROUNDS = (
    "rounds = { count = 2, prompts = 10, heldout = 5, prompt_tokens = 6, max_new_tokens = 8, "
    "steps = 2 }"
)


@pytest.fixture(scope="module")
def _done(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, tokenizer: Any, make_desk: type[Desk]
) -> tuple[Desk, list[str]]:
    """A student that went through two rounds on two machines, and what each command said."""
    from desk import RECIPE

    desk = make_desk(tmp_path_factory.mktemp("rounds"))
    save_teacher(desk.root / "teacher", tokenizer)
    text = RECIPE.format(texts=texts, teacher='model = "./teacher"')
    desk.write("r.toml", text.replace("[students.baseline]", f"{ROUNDS}\n[students.baseline]"))
    desk.edit(
        "objective = {{ kl".replace("{{", "{"),
        "rounds = { count = 2, share = 0 }\nobjective = { kl",
    )
    said = [desk.done("teacher-logits", "r.toml").stderr]
    hidden = desk.root / "elsewhere"
    for _ in range(2):
        (desk.root / "teacher").rename(hidden)  # the student's machine has no teacher
        for command in ("train-student", "rounds write"):
            said.append(desk.done(*command.split(), "r.toml", "--student", "small").stderr)
        hidden.rename(desk.root / "teacher")
        shutil.copytree(desk.run, desk.root / "there" / "r", ignore=_no_students)
        arguments = ("rounds", "capture", "r.toml", "--student", "small")
        said.append(desk.done(*arguments, "--runs", "there").stderr)
        shutil.copytree(
            desk.root / "there" / "r" / "students", desk.run / "students", dirs_exist_ok=True
        )
        shutil.rmtree(desk.root / "there")
    return desk, said
