"""Students whose model has other tokens than the teacher: their stores are made on the way."""

from __future__ import annotations

import json
import math
import re
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.maintenance.verify import verify
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.own_tokens import OwnTokens
from coldstill.pipeline.results.facts import capture_facts
from other_tokens import PAIRS, add_students, model_of
from spellings import byte_pairs
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

FALLING = '{ weight = 0, start = 1.0, schedule = "linear" }'
STUDENT = ("train-student", "r.toml", "--student")


@pytest.mark.slow
def test_students_with_other_tokens_share_one_store_and_are_compared_by_bytes(
    finished: Desk,
) -> None:
    model_of(finished.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    both = "objective = { kl = 0.5, chunk_likelihood = 1.0, cross_entropy = 0.1 }"
    add_students(
        finished,
        'like = "small"\nmodel = "./other"',
        f'like = "small"\nmodel = "./other"\n{both}',
        'like = "small"\nmodel = "./other"\nobjective = { kl = 0.0, skew_kl = 1.0 }',
        f'like = "small"\nmodel = "./other"\nobjective = {{ kl = 0.5, branches = {FALLING} }}',
    )
    first = finished.done(*STUDENT, "a").stderr
    [folder] = (finished.run / "tokens").iterdir()
    note = "students.a has other tokens than the teacher; the store is written in its tokens to "
    assert f"{note}runs/r/tokens/{folder.name}/logits" in first
    assert "kl unbiased with this record" in first
    known = r"the teacher's distribution is known at \d+\.\d% of the positions; "
    assert re.search(f"(?<!warning: ){known}kl learns from an estimate at the others", first)
    third = finished.done(*STUDENT, "c").stderr
    assert re.search(f"warning: {known}nothing is learned at the others", third)
    assert "add kl or cross_entropy to the objective" in third
    second = finished.done(*STUDENT, "b").stderr
    assert "retokenize" not in second
    assert "add kl" not in second
    assert "kl unbiased, chunk_likelihood exact with this record" in second
    finished.done("evaluate", "r.toml")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["heldout", "logits"]
    for name in ("logits", "heldout"):
        assert not list(verify(str(folder / name)))
    teacher = finished.json("teacher.evaluation.json")
    figures = {name: finished.json("students", name, "evaluation.json") for name in "ab"}
    heldout = open_store(folder / "heldout")
    manifest = heldout.manifest
    assert manifest.retokenized is not None
    for name, found in figures.items():
        assert found["tokens"] == manifest.tokenizer.fingerprint, name
        assert any(line.startswith("kl is off by the same amount") for line in found["caveats"])
        assert found["positions"] == heldout.positions > teacher["positions"]
        assert math.isfinite(found["kl"])
        # random weights: every token is about as probable as any other
        assert found["bits_per_byte"] > teacher["bits_per_byte"]
        assert found["cached_bytes_per_position"] > 0
    # all bytes of the text are predicted, so the teacher's figure is that of the run's own store
    left = manifest.retokenized.counts["left_labels"]
    assert left == 0
    warnings = finished.done("compare", "r").stderr
    assert "bits per byte do, across different tokens of one text" in warnings
    assert finished.done(*STUDENT, "a").stderr.count("already trained") == 1
    finished.done("export", "r", "a", "--to", "hf")
    finished.done("report", "r")
    metrics = (finished.run / "students" / "b" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert all(line["chunk_likelihood"] > 0 for line in lines)
    assert "retokenize" not in finished.done(*STUDENT, "d").stderr
    metrics = (finished.run / "students" / "d" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in metrics.splitlines()]
    assert all(line["branches"] > 0 for line in lines)
    weights = [line["weight_branches"] for line in lines]
    assert weights == sorted(weights, reverse=True)
    assert weights[0] > weights[-1]
    # nothing is learned from held-out text
    kept = {name: open_store(folder / name).manifest.capture for name in ("logits", "heldout")}
    assert kept["logits"].branches
    assert not kept["heldout"].branches


@pytest.mark.slow
def test_a_student_of_an_earlier_version_keeps_its_store(finished: Desk) -> None:
    model_of(finished.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    add_students(finished, 'like = "small"\nmodel = "./other"\nretokenize = { branches = 0.0 }')
    finished.done(*STUDENT, "a")
    [folder] = (finished.run / "tokens").iterdir()
    # as it was recorded before there were branches
    path = finished.run / "students" / "a" / "student.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["tokens"]["decisions"]["branches"], record["student"]["objective"]["branches"]
    record["student"]["retokenize"] = None
    path.write_text(json.dumps(record), encoding="utf-8")
    for path in folder.glob("*.json"):
        made = json.loads(path.read_text(encoding="utf-8"))
        del made["decisions"]["branches"]
        path.write_text(json.dumps(made), encoding="utf-8")
    finished.edit("retokenize = { branches = 0.0 }\n", "")
    key = OwnTokens(**record["tokens"]).key
    folder.rename(folder.with_name(key))
    assert "already trained" in finished.done(*STUDENT, "a").stderr
    finished.done("evaluate", "r.toml", "--student", "a")
    assert [each.name for each in (finished.run / "tokens").iterdir()] == [key]
    shutil.rmtree(finished.run / "tokens" / key / "logits")
    assert "already trained" in finished.done(*STUDENT, "a").stderr  # makes the same store again
    finished.edit('model = "./other"\n', f'model = "./other"\nobjective.branches = {FALLING}\n')
    line = finished.coldstill(*STUDENT, "a").stderr.splitlines()[-1]
    assert "students.a was trained with" in line
    assert "train another under a new name" in line


@pytest.mark.slow
def test_what_the_recipe_decides_makes_another_store(finished: Desk) -> None:
    model_of(finished.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    add_students(
        finished,
        'like = "small"\nmodel = "./other"\nretokenize = { ambiguous = "bucket" }',
        'like = "small"\nmodel = "./other"\nretokenize = { unaligned = "skip" }',
    )
    line = finished.refused(*STUDENT, "a")
    assert "students.a.retokenize: ambiguous = bucket needs a record without samples" in line
    assert "set logits.tail = 0 and a head, or ambiguous = split" in line
    alone = ("--set", 'students.small.retokenize={ unaligned = "skip" }')
    line = finished.refused("train-student", "r.toml", "--student", "n", *alone)
    assert "has 'retokenize' without 'model'" in line
    finished.done(*STUDENT, "b")
    record = finished.json("students", "b", "student.json")["tokens"]
    decided = {"ambiguous": "split", "special": {}, "unaligned": "skip", "branches": 0.25}
    assert record["decisions"] == decided
    [place] = [path.parent for path in (finished.run / "tokens").glob("*/logits/manifest.json")]
    store = open_store(place)
    reported = capture_facts(store)
    shown = json.loads(finished.done("inspect", str(place), "--json").stdout)
    for name in ("teacher_loss", "teacher_entropy", "head_mass"):
        assert getattr(reported, name) == shown[name]
    targets = store.read(np.arange(len(store))).targets
    inside = targets.chunk_sizes[:, 0] == 0
    assert inside.mean() > 0.01  # entropy is stored to within a thousandth
    assert reported.teacher_entropy == pytest.approx(targets.entropy[~inside].mean(), rel=2e-3)
    shutil.rmtree(place)
    line = finished.refused("evaluate", "r.toml", "--student", "b")
    assert "missing; the student 'b' has other tokens than the teacher" in line
    finished.done(*STUDENT, "b")  # makes the store again, and finds the student trained
    finished.done("evaluate", "r.toml", "--student", "b")


@pytest.mark.slow
def test_a_tokenizer_without_known_bytes_is_refused_before_anything_is_done(
    finished: Desk,
) -> None:
    tokenizer: Any = byte_pairs(PAIRS, end="</s>")
    tokenizer.decoder = None
    model_of(finished.root / "other", tokenizer, "</s>")
    assert Tokenizer.from_file(str(finished.root / "other" / "tokenizer.json")).decoder is None
    add_students(finished, 'like = "small"\nmodel = "./other"')
    line = finished.coldstill(*STUDENT, "a").stderr.splitlines()[-1]
    assert line.startswith("error: the tokenizer of students.a: the bytes of its tokens cannot be")
    assert not (finished.run / "students" / "a").exists()


def test_what_a_student_with_other_tokens_cannot_have_is_refused_before_the_teacher_works(
    desk: Desk,
) -> None:
    model_of(desk.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    desk.edit("[students.baseline]", '[students.a]\nmodel = "./other"\nKEY\n[students.baseline]')
    train = "train = { steps = 3, batch_tokens = 256 }"
    for key, message in (
        (f"{train}\nrounds = 2", "students.a.rounds: its tokens are not the teacher's, so the"),
        (
            f'{train}\nretokenize = {{ ambiguous = "bucket" }}',
            "students.a.retokenize: ambiguous = bucket needs a record without samples, which",
        ),
        (
            f"{train}\nretokenize = {{ branches = 0 }}\nobjective = {{ branches = 1.0 }}",
            "students.a.objective: branches: the store has no branches: set retokenize.branches",
        ),
    ):
        desk.edit("KEY", key)
        for command in ("plan", "run"):
            assert desk.refused(command, "r.toml").startswith(f"error: {message}")
        desk.edit(key, "KEY")


@pytest.mark.slow
def test_a_bucket_keeps_ambiguous_probability_of_the_head_and_held_out_samples_are_split(
    desk: Desk,
) -> None:
    model_of(desk.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    desk.edit("head = 4\ntail = 4", "head = 4\ntail = 0")
    add_students(desk, 'like = "small"\nmodel = "./other"\nretokenize = { ambiguous = "bucket" }')
    desk.done("teacher-logits", "r.toml")
    desk.done("plan", "r.toml")
    said = desk.done(*STUDENT, "a").stderr
    assert "samples have no bucket" not in said
    for _ in range(2):
        said += desk.done("evaluate", "r.toml", "--student", "a").stderr
    note = "retokenize heldout: samples have no bucket, so ambiguous = split here"
    assert said.count(note) == 1
    [folder] = (desk.run / "tokens").iterdir()
    found = [open_store(folder / name).manifest.retokenized for name in ("logits", "heldout")]
    assert [one.ambiguous for one in found if one] == ["bucket", "split"]
    assert math.isfinite(desk.json("students", "a", "evaluation.json")["kl"])


@pytest.mark.slow
def test_another_temperature_of_mapped_tokens_is_refused_with_what_helps(finished: Desk) -> None:
    model_of(finished.root / "other", byte_pairs(PAIRS, end="</s>"), "</s>")
    table = 'like = "small"\nmodel = "./other"\nobjective = { kl = 1.0, temperature = 2.0 }'
    add_students(finished, table)
    line = finished.coldstill(*STUDENT, "a").stderr.splitlines()[-1]
    assert "temperature 2.0 is not known in a student's own tokens" in line
    assert "capture again" not in line
    assert not (finished.run / "students" / "a").exists()
