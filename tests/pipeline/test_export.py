"""`coldstill export`: what is written, kept and refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.places.claims import claimed
from coldstill.stages.export import FORMATS
from safetensors.torch import load_file, save_file
from said import sentences

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk, Processes

pytest_plugins = ("desk",)

EXPORTS = ("students", "small", "exports")


def test_a_student_is_exported_checked_and_told_of(finished: Desk) -> None:
    result = finished.done("export", "r.toml", "small", "--to", "hf")
    folder = finished.run.joinpath(*EXPORTS, "hf")
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "export.json",
    }
    (line,) = sentences(result.stderr)
    assert line.startswith("export small hf: ")
    assert "largest difference 0, KL 0, top-1 agreement 100.00%" in line
    record = finished.json(*EXPORTS, "hf", "export.json")
    assert record["check"]["positions"] > 0
    assert record["check"]["kl"] == 0.0
    assert record["limits"]["agreement"] <= 1
    assert record["checked_by_own_runtime"] is True
    assert record["packages"].keys() >= {"torch", "transformers"}
    page = (folder / "README.md").read_text(encoding="utf-8")
    manifest = finished.json("logits", "manifest.json")
    for fact in (manifest["teacher"]["fingerprint"], manifest["corpus"]["fingerprint"]):
        assert fact in page
    assert "steps = 3" in page
    loss = finished.json("students", "small", "evaluation.json")["loss"]
    assert f"{loss:.4f}" in page


def test_what_is_exported_is_kept(finished: Desk) -> None:
    finished.done("export", "r.toml", "small", "--to", "hf")
    before = finished.snapshot()
    result = finished.done("export", "r.toml", "small", "--to", "hf")
    assert "export small hf: already exported: runs/r/students/small/exports/hf" in result.stderr
    assert finished.snapshot() == before


def test_every_file_is_recorded_and_a_damaged_one_is_named(finished: Desk) -> None:
    finished.done("export", "r.toml", "small", "--to", "hf")
    folder = finished.run.joinpath(*EXPORTS, "hf")
    files = finished.json(*EXPORTS, "hf", "export.json")["files"]
    assert files.keys() == {path.name for path in folder.iterdir()} - {"export.json"}
    for name in ("model.safetensors", "README.md", "tokenizer.json"):
        content = (folder / name).read_bytes()
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert files[name] == expected
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = bytearray(whole["model.safetensors"])
    weights[-5] ^= 1  # of the same size
    damages: list[tuple[str, bytes | None]] = [
        ("model.safetensors", bytes(weights)),
        ("model.safetensors", whole["model.safetensors"][:100]),
        ("tokenizer.json", None),
        ("export.json", b"[]"),
        ("export.json", b"{"),
    ]
    for name, damaged in damages:
        if damaged is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damaged)
        line = finished.refused("export", "r.toml", "small", "--to", "hf")
        assert line == (
            f"error: runs/r/students/small/exports/hf: damaged ({name}); delete that folder to "
            "write it anew"
        )
        (folder / name).write_bytes(whole[name])
    finished.done("export", "r.toml", "small", "--to", "hf")


def test_an_export_of_other_weights_is_refused(finished: Desk) -> None:
    finished.done("export", "r.toml", "small", "--to", "hf")
    model = finished.run / "students" / "small" / "model"
    shutil.rmtree(model)
    shutil.copytree(finished.run / "students" / "baseline" / "model", model)
    (finished.run / "students" / "small" / "evaluation.json").unlink()
    finished.done("evaluate", "r.toml")
    line = finished.refused("export", "r.toml", "small", "--to", "hf")
    assert "exports/hf: written from other weights of a student 'small'" in line
    assert "delete that folder to write it anew" in line


def test_elsewhere_is_below_the_folder_named(finished: Desk) -> None:
    finished.done("export", "r.toml", "small", "--to", "hf", "--output", "away")
    assert (finished.root / "away" / "hf" / "export.json").is_file()
    assert [path.name for path in (finished.root / "away").iterdir()] == ["hf"]
    assert not finished.run.joinpath(*EXPORTS).exists()


def test_another_student_s_export_is_never_to_be_deleted(finished: Desk) -> None:
    finished.done("export", "r.toml", "baseline", "--to", "hf", "--output", "away")
    line = finished.refused("export", "r.toml", "small", "--to", "hf", "--output", "away")
    assert line.startswith("error: away/hf: an export of student 'baseline' stands there (SHA-256 ")
    assert line.endswith("; name another folder with --output")
    assert "delete" not in line


def test_what_is_no_export_is_left_alone(finished: Desk) -> None:
    finished.write("away/hf/thesis.txt", "years of work")
    line = finished.refused("export", "r.toml", "small", "--to", "hf", "--output", "away")
    assert line.startswith("error: away/hf: no export, for it has no export.json; move it away")
    assert "delete" not in line


@pytest.mark.parametrize("there", [True, False], ids=["there", "not there"])
def test_a_refused_export_takes_away_only_folders_that_it_made(
    finished: Desk, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    tampered(monkeypatch)
    mine = finished.root / "my" / "own"
    if there:
        mine.mkdir(parents=True)
    finished.refused("export", "r.toml", "small", "--to", "hf", "--output", "my/own")
    assert mine.exists() == there
    assert mine.parent.exists() == there


def test_a_killed_export_is_written_anew_and_leaves_nothing(
    finished: Desk, processes: Processes
) -> None:
    exports = finished.run.joinpath(*EXPORTS)
    command = ("export", "r.toml", "small", "--to", "hf")
    process = processes.begin(finished, str(finished.root / "said"), *command)
    deadline = time.monotonic() + 60
    while not list(exports.glob(".unfinished-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert processes.end() == -signal.SIGKILL
    assert list(exports.glob(".unfinished-*"))
    assert not (exports / "hf").exists()
    finished.done(*command)
    assert [path.name for path in exports.iterdir()] == ["hf"]
    leftover = exports / ".unfinished-0123abcd-onnx"
    leftover.mkdir()
    (leftover / "model.onnx").write_bytes(b"half")
    result = finished.done(*command)  # with nothing to write
    assert "already exported" in result.stderr
    assert not leftover.exists()


@pytest.mark.parametrize("output", [None, "away"])
def test_two_at_once_do_not_write_to_one_folder(finished: Desk, output: str | None) -> None:
    folder = finished.run.joinpath(*EXPORTS) if output is None else finished.root / output
    option = () if output is None else ("--output", output)
    with claimed(folder / ".exporting") as ours:
        assert ours
        line = finished.refused("export", "r.toml", "small", "--to", "hf", *option)
    assert line.endswith(": another process is exporting there; wait for it")
    finished.done("export", "r.toml", "small", "--to", "hf", *option)


FORMATS_HAD = f"(have: {', '.join(FORMATS)})"


def test_formats_are_told_where_none_or_an_unknown_one_is_named(finished: Desk) -> None:
    line = finished.refused("export", "r.toml", "small", "--to", "hf", "--to", "foo")
    assert line == f"error: export: --to foo: no such format {FORMATS_HAD}"
    line = finished.refused("export", "r.toml", "small")
    assert line == f"error: export: say which format with --to {FORMATS_HAD}"
    told = " ".join(finished.done("export", "--help").stdout.split())
    assert f"Of {', '.join(FORMATS)}; may be repeated." in told


def test_a_format_named_twice_is_written_once_and_told_as_json(finished: Desk) -> None:
    result = finished.done("export", "r.toml", "small", "--to", "hf", "--to", "hf", "--json")
    assert len(sentences(result.stderr)) == 1
    record = finished.json(*EXPORTS, "hf", "export.json")
    assert json.loads(result.stdout) == [record]
    again = finished.done("export", "r.toml", "small", "--to", "hf", "--json")
    assert json.loads(again.stdout) == [record]


def test_without_its_store_a_student_s_page_tells_what_the_held_out_one_knows(
    finished: Desk,
) -> None:
    shutil.rmtree(finished.run / "logits")
    finished.done("export", "r.toml", "small", "--to", "hf")
    page = finished.run.joinpath(*EXPORTS, "hf", "README.md").read_text(encoding="utf-8")
    manifest = finished.json("heldout", "manifest.json")
    for fact in (
        manifest["teacher"]["fingerprint"],
        manifest["corpus"]["fingerprint"],
        "| capture | no longer here |",
    ):
        assert fact in page, fact


def test_an_unfinished_student_is_refused(finished: Desk) -> None:
    shutil.rmtree(finished.run / "students" / "small" / "model")
    line = finished.refused("export", "r.toml", "small", "--to", "hf")
    assert "students/small: its training is not finished" in line
    assert "coldstill train-student r --student small" in line


def test_a_student_that_is_not_there_is_named_with_those_that_are(finished: Desk) -> None:
    line = finished.refused("export", "r.toml", "tiny", "--to", "hf")
    assert "no student 'tiny' there (have: baseline, small)" in line
    (finished.run / "students" / "cut" / "start").mkdir(parents=True)  # as prune-student leaves it
    line = finished.refused("export", "r.toml", "cut", "--to", "hf")
    assert "students/cut: its training is not finished" in line


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [
        ("onnx", "onnxruntime", "onnx"),
        ("onnx-int8", "onnxscript", "onnx"),
        ("gguf-f16", "gguf", "gguf"),
        ("torchao-int8", "torchao", "torchao"),
    ],
)
def test_a_missing_extra_is_one_line_with_the_command(
    finished: Desk, monkeypatch: pytest.MonkeyPatch, to: str, package: str, extra: str
) -> None:
    real = importlib.util.find_spec
    for other in FORMATS[to].packages:
        if real(other) is None and other != package:
            pytest.skip(f"{other} is missing too")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == package else real(name)
    )
    line = finished.refused("export", "r.toml", "small", "--to", to)
    assert line == (f"error: export: --to {to} needs {package}: pip install 'coldstill[{extra}]'")


def tampered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An export whose file says something else than the student: one row of one matrix."""
    form = type(FORMATS["hf"])
    write = form.write

    def spoil(self: Any, source: Any, folder: Path, base: Path | None = None) -> Any:
        notes = write(self, source, folder, base)
        path = folder / "model.safetensors"
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("down_proj.weight"))
        weights[name][3] += 1.0
        save_file(weights, path, metadata={"format": "pt"})
        return notes

    monkeypatch.setattr(form, "write", spoil)


def test_wrong_weights_are_found_and_leave_nothing_behind(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch)
    line = finished.refused("export", "r.toml", "small", "--to", "hf")
    assert line.startswith("error: export small hf: transformers ")
    assert "does not say what the student says" in line
    assert "largest difference" in line
    assert "(at most 1e-05)" in line
    assert not finished.run.joinpath(*EXPORTS).exists()


def test_a_graph_of_other_weights_is_found(finished: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from coldstill.stages.export.onnx import int8 as onnx_int8

    quantise = onnx_int8.quantise

    def spoil(whole: Path, path: Path) -> None:
        quantise(whole, path)
        model = onnx.load(path)
        rows = next(i for i in model.graph.initializer if i.name == "embedding_rows")
        turned = onnx.numpy_helper.to_array(rows)[::-1].copy()  # every token another's
        rows.CopyFrom(onnx.numpy_helper.from_array(turned, name=rows.name))
        onnx.save_model(model, path)

    monkeypatch.setattr(onnx_int8, "quantise", spoil)
    finished.done("export", "r.toml", "small", "--to", "hf")
    line = finished.refused("export", "r.toml", "small", "--to", "onnx-int8")
    assert line.startswith("error: export small onnx-int8: onnxruntime ")
    assert "KL " in line
    monkeypatch.undo()
    finished.done("export", "r.toml", "small", "--to", "onnx-int8")
    assert finished.json(*EXPORTS, "onnx-int8", "export.json")["check"]["kl"] < 0.01


def test_a_file_for_llama_cpp_says_who_has_checked_it(finished: Desk) -> None:
    pytest.importorskip("gguf")
    result = finished.done("export", "r.toml", "small", "--to", "gguf-q8_0")
    record = finished.json(*EXPORTS, "gguf-q8_0", "export.json")
    if importlib.util.find_spec("llama_cpp") is None:
        assert record["checked_by"].startswith("the GGUF reader of transformers")
        assert record["checked_by_own_runtime"] is False
        assert "its own runtime is not installed" in result.stderr
        assert record["costs"]["generation"] == []
    else:
        assert record["checked_by"].startswith("llama.cpp")
        assert record["costs"]["generation"]
    assert finished.run.joinpath(*EXPORTS, "gguf-q8_0", "small-q8_0.gguf").is_file()


def test_what_a_format_does_not_know_of_a_student_is_refused(finished: Desk) -> None:
    pytest.importorskip("gguf")
    path = finished.run / "students" / "small" / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "hidden_act": "relu"}), encoding="utf-8")
    finished.done("evaluate", "r.toml")  # it is another model by now
    line = finished.refused("export", "r.toml", "small", "--to", "gguf-f16")
    assert "students.small: cannot be written as gguf-f16: a 'llama' model with the " in line


def test_without_a_held_out_store_there_is_nothing_to_check_on(finished: Desk) -> None:
    shutil.rmtree(finished.run / "heldout")
    line = finished.refused("export", "r.toml", "small", "--to", "hf")
    assert "heldout: no store there; make it first with coldstill teacher-logits" in line


def test_what_can_be_exported_is_and_what_cannot_fails_in_the_end(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FORMATS["gguf-f16"]), "refusal", lambda *_: "of no kind it knows")
    result = finished.coldstill(
        "export", "r.toml", "small", "--to", "gguf-f16", "--to", "hf", "--json"
    )
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line == (
        "error: 1 of 2 exports failed (hf done): gguf-f16: students.small: cannot be written as "
        "gguf-f16: of no kind it knows"
    )
    assert finished.run.joinpath(*EXPORTS, "hf", "export.json").is_file()
    assert not finished.run.joinpath(*EXPORTS, "gguf-f16").exists()
    assert [record["format"] for record in json.loads(result.stdout)] == ["hf"]


def test_what_a_library_raises_while_it_writes_is_one_line(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError("unexpected\nkeyword")

    monkeypatch.setattr(type(FORMATS["hf"]), "write", fail)
    line = finished.refused("export", "r.toml", "small", "--to", "hf")
    assert line == (
        "error: students.small: --to hf cannot be done: unexpected; take another format"
    )
