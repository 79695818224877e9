"""Weights that are not the checkpoint's stop every command before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from checkpoints import renamed, save_checkpoint

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

compiled = renamed(lambda key: f"_orig_mod.{key}")


@pytest.mark.parametrize("correcting", [False, True])
def test_a_teacher_saved_from_a_compiled_model_is_refused(
    desk: Desk, tokenizer: Any, correcting: bool
) -> None:
    save_checkpoint(desk.root / "teacher", tokenizer, compiled)
    train = "\ntrain = { steps = 2 }" if correcting else ""
    desk.edit("[teacher]\nmodel = ", f'[teacher]\nmodel = "teacher"{train}\n#')
    line = desk.refused("train-teacher" if correcting else "teacher-logits", "r.toml")
    assert line.startswith("error: teacher.model: the weights in ")
    assert "the names in the file carry '_orig_mod.'" in line
    assert "torch.compile" in line
    assert not (desk.run / "corpus").exists()
    if not correcting:
        assert desk.refused("plan", "r.toml", "--pilot", "2") == line


def test_a_student_and_a_teacher_of_tasks_are_looked_at_too(finished: Desk, tokenizer: Any) -> None:
    save_checkpoint(finished.root / "base", tokenizer, compiled)
    train = "train = { steps = 1, batch_tokens = 256 }"
    finished.edit(
        "[students.baseline]", f'[students.own]\nmodel = "base"\n{train}\n[students.baseline]'
    )
    line = finished.refused("train-student", "r.toml", "--student", "own")
    assert line.startswith("error: students.own.model: the weights in ")
    # a trained student's own file, exchanged by another
    save_checkpoint(finished.run / "students" / "small" / "model", tokenizer, compiled)
    for command in (("evaluate", "r.toml"), ("export", "r", "small", "--to", "hf")):
        line = finished.refused(*command)
        assert line.startswith("error: students.small: the weights in runs/r/students/small/model ")
