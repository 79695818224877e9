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
from printed import sentences
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk, Processes

pytest_plugins = ("desk",)

EXPORTS = ("students", "small", "exports")
HF = ("export", "r.toml", "small", "--to", "hf")


@pytest.mark.slow
def test_an_export_is_checked_recorded_and_kept(finished: Desk) -> None:
    result = finished.done(*HF, "--to", "hf", "--json")  # named twice, written once
    folder = finished.run.joinpath(*EXPORTS, "hf")
    (line,) = sentences(result.stderr)
    assert line.startswith("export small hf: ")
    assert "largest difference 0, KL 0, top-1 agreement 100.00%" in line
    record = finished.json(*EXPORTS, "hf", "export.json")
    assert json.loads(result.stdout) == [record]
    assert record["check"]["positions"] > 0
    assert record["check"]["kl"] == 0.0
    assert record["limits"]["agreement"] <= 1
    assert record["checked_by_own_runtime"] is True
    assert record["packages"].keys() >= {"torch", "transformers"}
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "tokenizer.json", "generation_config.json", "README.md"}
    assert record["files"].keys() == names - {"export.json"}
    for name in ("model.safetensors", "README.md", "tokenizer.json"):
        content = (folder / name).read_bytes()
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert record["files"][name] == expected
    page = (folder / "README.md").read_text(encoding="utf-8")
    manifest = finished.json("logits", "manifest.json")
    loss = finished.json("students", "small", "evaluation.json")["loss"]
    for fact in (
        manifest["teacher"]["fingerprint"],
        manifest["corpus"]["fingerprint"],
        "steps = 3",
        f"{loss:.4f}",
    ):
        assert fact in page

    before = finished.snapshot()
    again = finished.done(*HF, "--json")
    assert "export small hf: already exported: runs/r/students/small/exports/hf" in again.stderr
    assert json.loads(again.stdout) == [record]
    assert finished.snapshot() == before

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
        assert finished.refused(*HF) == (
            f"error: runs/r/students/small/exports/hf: damaged ({name}); delete that folder to "
            "export it again"
        )
        (folder / name).write_bytes(whole[name])

    # other weights of the same student
    model = finished.run / "students" / "small" / "model"
    shutil.rmtree(model)
    shutil.copytree(finished.run / "students" / "baseline" / "model", model)
    finished.done("evaluate", "r.toml")
    line = finished.refused(*HF)
    assert "exports/hf: written from other weights of student 'small'" in line
    assert "delete that folder to export it again" in line


@pytest.mark.slow
def test_another_folder_holds_only_exports_of_this_student(finished: Desk) -> None:
    away = ("--output", "away")
    baseline = ("export", "r.toml", "baseline", "--to", "hf", *away)
    for folder, command in (
        (finished.run.joinpath(*EXPORTS), HF),
        (finished.root / "away", baseline),
    ):
        with claimed(folder / ".exporting") as ours:
            assert ours
            line = finished.refused(*command)
        assert line.endswith(": another process is exporting to it; wait for it")
    shutil.rmtree(finished.run / "logits")
    finished.done(*baseline)
    assert [path.name for path in (finished.root / "away").iterdir()] == ["hf"]
    page = (finished.root / "away" / "hf" / "README.md").read_text(encoding="utf-8")
    manifest = finished.json("heldout", "manifest.json")  # without a store the card names this one
    for fact in (
        manifest["teacher"]["fingerprint"],
        manifest["corpus"]["fingerprint"],
        "| capture | no longer here |",
    ):
        assert fact in page, fact
    line = finished.refused(*HF, *away)
    assert line.startswith("error: away/hf: already has an export of student 'baseline' (SHA-256 ")
    assert line.endswith("; name another folder with --output")
    assert "delete" not in line
    shutil.rmtree(finished.root / "away")
    finished.write("away/hf/thesis.txt", "years of work")
    line = finished.refused(*HF, *away)
    assert line.startswith("error: away/hf: not an export, for it has no export.json; move it away")
    assert "delete" not in line
    shutil.rmtree(finished.run / "heldout")
    line = finished.refused(*HF)
    assert "heldout: no store there; make it first with coldstill teacher-logits" in line


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make exports wrong in one row of one matrix."""
    form = type(FORMATS["hf"])
    write = form.write

    def spoilt(self: Any, student: Any, folder: Path, base: Path | None = None) -> Any:
        notes = write(self, student, folder, base)
        path = folder / "model.safetensors"
        weights = load_file(path)
        name = next(name for name in weights if name.endswith("down_proj.weight"))
        weights[name][3] += 1.0
        save_file(weights, path, metadata={"format": "pt"})
        return notes

    monkeypatch.setattr(form, "write", spoilt)


@pytest.mark.slow
def test_wrong_weights_are_refused_and_leave_only_folders_that_existed(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    line = finished.refused(*HF)
    assert line.startswith("error: export small hf: transformers ")
    assert "does not reproduce the student" in line
    assert "largest difference" in line
    assert "(at most 1e-05)" in line
    assert line.endswith("; nothing was kept")
    assert not finished.run.joinpath(*EXPORTS).exists()
    mine = finished.root / "my" / "own"
    finished.refused(*HF, "--output", "my/own")
    assert not mine.parent.exists()
    mine.mkdir(parents=True)
    finished.refused(*HF, "--output", "my/own")
    assert mine.exists()


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_after_the_next_one(
    finished: Desk, processes: Processes
) -> None:
    exports = finished.run.joinpath(*EXPORTS)
    process = processes.begin(finished, str(finished.root / "output"), *HF)
    deadline = time.monotonic() + 60
    while not list(exports.glob(".unfinished-*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    assert processes.end() == -signal.SIGKILL
    assert list(exports.glob(".unfinished-*"))
    assert not (exports / "hf").exists()
    finished.done(*HF)
    assert [path.name for path in exports.iterdir()] == ["hf"]
    leftover = exports / ".unfinished-0123abcd-onnx"
    leftover.mkdir()
    (leftover / "model.onnx").write_bytes(b"half")
    assert "already exported" in finished.done(*HF).stderr
    assert not leftover.exists()


@pytest.mark.slow
def test_wrong_names_are_refused_with_the_known_ones(finished: Desk) -> None:
    have = f"(have: {', '.join(FORMATS)})"
    line = finished.refused(*HF, "--to", "foo")
    assert line == f"error: export: --to foo: no such format {have}"
    line = finished.refused("export", "r.toml", "small")
    assert line == f"error: export: name a format with --to {have}"
    text = "".join(finished.done("export", "--help").stdout.split())  # a line may end in a hyphen
    assert f"Oneof{','.join(FORMATS)};mayberepeated." in text
    line = finished.refused("export", "r.toml", "tiny", "--to", "hf")
    assert "no student 'tiny' (have: baseline, small)" in line
    (finished.run / "students" / "cut" / "start").mkdir(parents=True)  # as of prune-student
    line = finished.refused("export", "r.toml", "cut", "--to", "hf")
    assert "students/cut: not trained to its end" in line
    shutil.rmtree(finished.run / "students" / "small" / "model")
    line = finished.refused(*HF)
    assert "students/small: not trained to its end" in line
    assert "coldstill train-student r --student small" in line


@pytest.mark.slow
def test_a_missing_extra_is_named_with_its_command(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    for to, package, extra in (
        ("onnx", "onnx", "onnx"),
        ("onnx-int8", "onnx", "onnx"),
        ("gguf-f16", "gguf", "gguf"),
        ("torchao-int8", "torchao", "torchao"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, *_, package=package: None if name == package else real(name),
            )
            line = finished.refused("export", "r.toml", "small", "--to", to)
        expected = f"error: export: --to {to} needs {package}: pip install 'coldstill[{extra}]'"
        assert line == expected


@pytest.mark.slow
def test_a_wrong_graph_is_found(finished: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from coldstill.stages.export.onnx import int8 as onnx_int8

    quantise = onnx_int8.quantise

    def spoilt(whole: Path, path: Path) -> None:
        quantise(whole, path)
        model = onnx.load(path)
        rows = next(i for i in model.graph.initializer if i.name.endswith("_levels"))
        turned = onnx.numpy_helper.to_array(rows)[::-1].copy()  # swapped token rows
        rows.CopyFrom(onnx.numpy_helper.from_array(turned, name=rows.name))
        onnx.save_model(model, path)

    monkeypatch.setattr(onnx_int8, "quantise", spoilt)
    line = finished.refused("export", "r.toml", "small", "--to", "onnx-int8")
    assert line.startswith("error: export small onnx-int8: onnxruntime ")
    assert "KL " in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "checker",
    [pytest.param("llama.cpp", marks=pytest.mark.llama_cpp), "the GGUF reader of transformers"],
)
def test_a_gguf_file_records_who_checked_it(
    checker: str, finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    from coldstill.stages.export.gguf import format as gguf_format

    is_own = checker == "llama.cpp"
    monkeypatch.setattr(gguf_format, "has_llama_cpp", lambda: is_own)
    result = finished.done("export", "r.toml", "small", "--to", "gguf-q8_0")
    record = finished.json(*EXPORTS, "gguf-q8_0", "export.json")
    assert record["checked_by"].startswith(checker)
    assert record["checked_by_own_runtime"] is is_own
    assert ("its own runtime is not installed" in result.stderr) is not is_own
    assert bool(record["costs"]["generation"]) is is_own
    assert finished.run.joinpath(*EXPORTS, "gguf-q8_0", "small-q8_0.gguf").is_file()

    path = finished.run / "students" / "small" / "model" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "hidden_act": "relu"}), encoding="utf-8")
    finished.done("evaluate", "r.toml")  # it is another model now
    line = finished.refused("export", "r.toml", "small", "--to", "gguf-f16")
    assert "students.small: cannot be written as gguf-f16: a 'llama' model with the " in line


@pytest.mark.slow
def test_a_failed_export_does_not_stop_the_others(
    finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(FORMATS["gguf-f16"]), "refusal", lambda *_: "an unknown kind")
    result = finished.coldstill(*HF, "--to", "gguf-f16", "--json")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: 1 of 2 exports failed (hf done): gguf-f16: students.small: cannot be written as "
        "gguf-f16: an unknown kind"
    )
    assert not finished.run.joinpath(*EXPORTS, "gguf-f16").exists()
    record = finished.json(*EXPORTS, "hf", "export.json")
    assert json.loads(result.stdout) == [record]

    def fail(*_: object, **__: object) -> None:
        raise TypeError("unexpected\nkeyword")

    monkeypatch.setattr(type(FORMATS["hf"]), "write", fail)
    line = finished.refused("export", "r.toml", "baseline", "--to", "hf")
    expected = "error: students.baseline: --to hf cannot be done: unexpected; use another format"
    assert line == expected


@pytest.mark.slow
def test_a_student_of_few_bits_is_named_everywhere_and_exported_on_its_grid(
    finished: Desk,
) -> None:
    pytest.importorskip("torchao")
    made = ("--student", "four", "--set", "students.small.quantize=int4")
    result = finished.done("train-student", "r.toml", *made)
    assert "train-student four: int4: rounds matrices, " in result.stderr
    folder = ("students", "four")
    assert finished.json(*folder, "model", "quantization.json")["scheme"] == "int4"
    assert finished.json(*folder, "student.json")["student"]["quantize"]["scheme"] == "int4"
    finished.done("evaluate", "r.toml", "--student", "four")
    assert finished.json(*folder, "evaluation.json")["grid"] == "int4"
    finished.done("export", "r.toml", "four", "--to", "gguf-q4_0", "--to", "gguf-q8_0")
    same, other = (
        finished.json(*folder, "exports", to, "export.json") for to in ("gguf-q4_0", "gguf-q8_0")
    )
    assert "its weights were trained rounded as this format rounds them (int4)" in same["notes"]
    (note,) = other["notes"]
    assert note.endswith("(int4) for gguf-q4_0; gguf-q8_0 rounds them again, to other values")
    # read back without llama.cpp, the file gives the student's own logits
    most = 1e-9 if same["checked_by"].startswith("transformers") else 1e-3
    assert same["check"]["kl"] < most
    assert same["limits"] == other["limits"]
    assert same["costs"]["bytes"] < other["costs"]["bytes"]
    assert same["costs"]["dtype"] == "q4_0"
    page = finished.run.joinpath(*folder, "exports", "gguf-q4_0", "README.md")
    assert "| trained with rounded weights | scheme = int4 |" in page.read_text(encoding="utf-8")
    assert "fp32 (int4 values)" in finished.done("compare", "r.toml").stdout
    # a student without rounding, in the same format
    finished.done("export", "r.toml", "small", "--to", "gguf-q4_0")
    plain = finished.json(*EXPORTS, "gguf-q4_0", "export.json")
    assert plain["notes"] == []
    assert plain["limits"]["kl"] > same["limits"]["kl"]
    assert plain["check"]["kl"] > 10 * same["check"]["kl"]
    line = finished.refused(
        "train-student", "r.toml", "--student", "narrow", "--set", "students.small.quantize=int8",
        "--set", "students.small.architecture.feed_forward=40",
    )  # fmt: skip
    assert line == (
        "error: students.narrow.quantize: int8 has one scale for every 32 inputs of a layer, and "
        "model.layers.0.mlp.down_proj has 40; choose sizes that are multiples of 32, or quantize = "
        "'int8-row'"
    )
