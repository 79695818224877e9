"""Facts of a report as a large run would give them, for tests of its page."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from coldstill.data.codecs import CodecError
from coldstill.data.schema import Capture
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import Run
from coldstill.pipeline.recipe.work import Work
from coldstill.pipeline.results.continuations import Continuations, PromptTexts
from coldstill.pipeline.results.facts import (
    CaptureFacts,
    HeldoutFacts,
    Histogram,
    Measurements,
    ReportFacts,
    gather,
)
from coldstill.pipeline.results.lineage import CorpusFacts, SplitFacts, TeacherFacts
from coldstill.stages.report import silent
from compared import Made, write_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

LLAMA = {"family": "llama", "layers": 2, "hidden": 128, "heads": 4}
CODE = "def add(a, b):\n\treturn a + b  # \u00fcber\n\n" + "x" * 90
STUDENTS = [Made(name="small"), Made(name="bare", loss=5.5, cached=0.0)]


def report_facts(runs: Path, students: Sequence[Made] = STUDENTS, name: str = "big") -> ReportFacts:
    """Facts of a run whose figures, stores and models are made up."""
    root = write_run(runs, name, students)
    (root / "recipe.toml").write_text('name = "big"  # <b>\n', encoding="utf-8")
    write(root / "env.json", {"python": "3.11.7", "platform": "Linux", "torch": "2.13.0"})
    for path in root.glob("students/*/student.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        write(path, {"student": {"architecture": LLAMA, **table["student"]}})
    work = Work(load_recipe(str(root)), Run(root), silent)
    return dataclasses.replace(
        gather(work, prompts=0),
        teacher=TeacherFacts(
            origin="org/teacher, as it is", name="org/teacher", family="llama",
            parameters=34_588_160, dtype="bfloat16", fingerprint="f00d" * 16,
        ),
        corpus=corpus(),
        record=record(),
        heldout=HeldoutFacts(positions=108_179, head=128, tail=32),
        continuations=texts([one.name for one in students]),
    )  # fmt: skip


def corpus() -> CorpusFacts:
    """A corpus of two splits."""
    train = SplitFacts(documents=697, fingerprint="cafe" * 16, tokens=3_386_258, sequences=9)
    return CorpusFacts(
        files=("texts/",), sources=731, documents=731, tokens=3_494_437, supervised_share=0.988,
        heldout_share=0.0465, prompts=False,
        splits={
            "train": train, "heldout": dataclasses.replace(train, documents=34, tokens=108_179)
        },
    )  # fmt: skip


def record(head: int = 16) -> CaptureFacts:
    """A whole store of the teacher's record."""
    entropy = [int(3000 * math.exp(-(((place - 8) / 4) ** 2))) for place in range(24)]
    return CaptureFacts(
        path="runs/big/logits", shards=3, shards_done=3, sequences=160, planned_sequences=160,
        tokens=40_960, positions=40_785, bytes=1_737_441, bytes_per_position=42.6,
        teacher_loss=4.8, teacher_entropy=4.1, head_mass=0.484, codec_kl=0.00016, vocabulary=4096,
        full_logits_bytes=334_110_720,
        entropy_histogram=Histogram(
            starts=tuple(i / 2 for i in range(24)), positions=tuple(entropy)
        ),
        mass_histogram=Histogram(
            starts=tuple(i / 20 for i in range(20)),
            positions=tuple(100 + 10 * place for place in range(20)),
        ),
        measurements=Measurements(
            capture_tokens_per_second=11_803.0, capture_peak_memory_bytes=429_342_720,
            machine="2 CPU threads",
        ),
        capture=Capture(head=head, tail=16, temperatures=(2.0,)),
        codec={"name": "compact", "levels": 127}, store={"name": "arrow", "zstd": 3},
        error=CodecError(maximum=0.025, measured=0.01),
    )  # fmt: skip


def texts(names: Sequence[str]) -> Continuations:
    """Continuations of three prompts by the teacher and these students."""
    prompt = PromptTexts(
        sequence=12, document=3, text=CODE, tokens=32, next=CODE,
        models=dict.fromkeys(["teacher", *names], CODE),
    )  # fmt: skip
    return Continuations(
        seed=0, temperature=0.7, asked=3, note="", missing={}, prompts=[prompt] * 3
    )  # fmt: skip


def write(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")
