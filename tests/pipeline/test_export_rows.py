"""Exports in the comparison: their rows and figures beside those of their student."""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytestmark = pytest.mark.slow

pytest_plugins = ("desk",)

QUALITY = (
    "loss", "perplexity", "bits_per_byte", "kl", "agreement", "accuracy", "acceptance", "ece",
)  # fmt: skip


def record(desk: Desk, student: str = "small") -> Path:
    return desk.run / "students" / student / "exports" / "hf" / "export.json"


def compared(desk: Desk) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(desk.done("compare", "r.toml", "--json").stdout)
    return rows


@pytest.fixture
def exported(finished: Desk) -> Desk:
    finished.done("export", "r.toml", "small", "--to", "hf")
    return finished


def test_an_export_of_the_same_weights_has_the_same_figures(exported: Desk) -> None:
    exported.done("export", "runs/r", "baseline", "--to", "hf")
    rows = compared(exported)
    names = [row["name"] for row in rows]
    assert names[0] == "teacher"
    for name in ("small", "baseline"):
        place = names.index(name)
        own, row = rows[place : place + 2]
        assert row["name"] == f"{name} (hf)"
        assert (row["role"], row["of"], row["format"]) == ("export", name, "hf")
        same = ("parameters", "positions", "heldout", "weights", "machine", "flops_per_token")
        for key in (*same, "cached_bytes_per_position"):
            assert row[key] == own[key], key
        for key in QUALITY:
            assert row[key] == pytest.approx(own[key], rel=1e-6), key
        assert row["kl_from_student"] == 0.0
        assert (own["dtype"], row["dtype"]) == ("fp32", "fp32")
        work = ("batch", "prompt_tokens", "new_tokens")
        (speed,) = row["generation"]
        assert [speed[key] for key in work] == [own["generation"][0][key] for key in work]
        assert speed["memory_bytes"] > 4 * row["parameters"]
    page = (exported.run / "comparison.html").read_text(encoding="utf-8")
    assert "2 students" in page
    files = [path for path in record(exported).parent.rglob("*") if path.is_file()]
    files += (exported.run / "students" / "small" / "model").iterdir()
    usual = (exported.run / "env.json").stat().st_mode
    assert {path.stat().st_mode for path in files} == {usual}


def test_figures_are_the_students_plus_the_difference_on_the_sample(exported: Desk) -> None:
    own = exported.json("students", "small", "evaluation.json")
    saved = json.loads(record(exported).read_text(encoding="utf-8"))
    ours, theirs = saved["sample"]["student"], saved["sample"]["export"]
    for key in ("loss", "kl", "agreement", "accuracy", "acceptance", "ece"):
        ours[key] = 0.25
        theirs[key] = 0.25 - 0.5**7
    theirs["positions"] = 321
    record(exported).write_text(json.dumps(saved), encoding="utf-8")
    row = next(row for row in compared(exported) if row["role"] == "export")
    for key in ("loss", "kl", "agreement", "accuracy", "acceptance", "ece"):
        assert row[key] == pytest.approx(max(0.0, own[key] - 0.5**7)), key
    assert row["perplexity"] == pytest.approx(math.exp(own["loss"] - 0.5**7))
    assert row["bits_per_byte"] / own["bits_per_byte"] == pytest.approx(row["loss"] / own["loss"])
    assert row["sample_positions"] == 321
    theirs["agreement"] = 3.0
    theirs["kl"] = -3.0
    record(exported).write_text(json.dumps(saved), encoding="utf-8")
    row = next(row for row in compared(exported) if row["role"] == "export")
    assert (row["agreement"], row["kl"]) == (1.0, 0.0)


def test_stale_and_unfinished_exports_have_no_row(exported: Desk) -> None:
    folder = record(exported).parent
    for name in (".unfinished-deadbeef-hf", "mine"):
        other = folder.parent / name
        other.mkdir()
        (other / "export.json").write_bytes(record(exported).read_bytes())
    path = exported.run / "students" / "small" / "evaluation.json"
    own = json.loads(path.read_text(encoding="utf-8"))
    assert sum(row["role"] == "export" for row in compared(exported)) == 1
    path.write_text(json.dumps({**own, "weights": "0" * 64}), encoding="utf-8")
    result = exported.done("compare", "r.toml", "--json")
    rows = json.loads(result.stdout)
    assert [row["role"] for row in rows] == ["teacher", "student", "student"]
    assert next(row for row in rows if row["name"] == "small")["stale_exports"] == ["hf"]
    warning = "small: its export hf was made from other weights than its figures, so it is left out"
    assert warning in result.stderr
    path.write_text(json.dumps(own), encoding="utf-8")
    student = json.loads(record(exported).read_text(encoding="utf-8"))["student"]
    for text in ("[]", json.dumps({"student": student}), "no JSON"):
        record(exported).write_text(text, encoding="utf-8")
        line = exported.refused("compare", "r.toml")
        assert "students/small/exports/hf/export.json: damaged; delete its folder" in line


def test_figures_of_other_weights_are_measured_again(finished: Desk) -> None:
    assert "already done" in finished.done("evaluate", "r.toml", "--student", "small").stderr
    students = finished.run / "students"
    weights = students / "small" / "model" / "model.safetensors"
    now = (students / "small" / "evaluation.json").stat().st_mtime_ns
    os.utime(weights, ns=(now + 1, now + 1))
    warning = "small: its figures are older than its weights; run coldstill evaluate"
    assert warning in finished.done("compare", "r.toml").stderr
    # the same weights keep their figures, also if a file's time is newer
    assert "already done" in finished.done("evaluate", "r.toml", "--student", "small").stderr
    assert warning not in finished.done("compare", "r.toml").stderr
    # damaged figures are measured again
    path = students / "small" / "evaluation.json"
    loss = json.loads(path.read_text(encoding="utf-8"))["loss"]
    path.write_text("", encoding="utf-8")
    finished.done("evaluate", "r.toml")
    assert finished.json("students", "small", "evaluation.json")["loss"] == loss
    # a student is evaluated before its export: other weights again, also if their file is old
    shutil.copy2(students / "baseline" / "model" / "model.safetensors", weights)
    assert warning not in finished.done("compare", "r.toml").stderr
    finished.done("export", "r.toml", "small", "--to", "hf")
    small, baseline = (
        finished.json("students", name, "evaluation.json") for name in ("small", "baseline")
    )
    assert small["loss"] == baseline["loss"]
    page = (record(finished).parent / "README.md").read_text(encoding="utf-8")
    assert f"{baseline['loss']:.4f}" in page
    assert [row["role"] for row in compared(finished)].count("export") == 1
