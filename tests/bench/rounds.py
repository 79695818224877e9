"""What a round on a student's own text is worth, against as many steps on old text.

For each seed there are three students: one goes on with old text only (`share = 0`), one mixes its
own text in, and one does that with the Jensen-Shannon divergence. Their first trainings are equal.
KL and acceptance are measured on what each student itself writes, after the first training and
after the second. Without arguments the teacher and the texts are those of the demo. A stopped
benchmark continues.

python tests/bench/rounds.py --seeds 3
python tests/bench/rounds.py --teacher MODEL --texts TEXTS.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill
from coldstill.data.store.reader import open_store
from coldstill.pipeline.quiet import quiet
from coldstill.pipeline.recipe.reading import BUILT_IN
from coldstill.pipeline.recipe.work import open_work
from coldstill.pipeline.steps.own_text import scored_texts
from coldstill.pipeline.steps.rounds import finish_rounds
from coldstill.stages.evaluate import evaluate_own_text, measure_quality
from coldstill.stages.models.device import describe_machine
from coldstill.stages.models.isolation import student_isolation
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from measure import OUTPUT

if TYPE_CHECKING:
    from coldstill.pipeline.recipe.work import Work
    from coldstill.stages.report import Report

WAYS = {
    "old text": "share = 0.0",
    "own text, kl": "share = 0.5",
    "own text, jsd": "share = 0.5, objective = { kl = 0.0, jsd = 1.0 }",
}
OTHER = """\
name = "rounds"
[corpus]
files = ["TEXTS"]
sequence_length = 256
holdout = 0.1
[teacher]
model = "MODEL"
[logits]
head = 16
tail = 16
sequences = 160
[evaluation]
sequences = 64
"""
"""The recipe for another teacher; what is stored is as in the demo."""


def recipe(asked: argparse.Namespace) -> str:
    """The demo, or another teacher, with the students to compare."""
    if asked.teacher is None:
        text = (BUILT_IN / "demo.toml").read_text(encoding="utf-8").partition("[students.small]")[0]
        text = text.replace('name = "demo"', 'name = "rounds"')
    else:
        text = OTHER.replace("TEXTS", str(asked.texts.resolve()))
        text = text.replace("MODEL", str(asked.teacher.resolve()))
    sizes = f"{{ layers = {asked.layers}, hidden = {asked.hidden}, heads = 4 }}"
    train = f"batch_tokens = 1024, learning_rate = 2e-3, warmup = 0.1, steps = {asked.steps}"
    for seed in range(asked.seeds):
        for way, settings in WAYS.items():
            rounds = f"count = 2, prompts = {asked.prompts}, heldout = {asked.heldout}"
            rounds += f", max_new_tokens = {asked.tokens}, steps = {asked.later}, {settings}"
            text += f"[students.{name_of(way, seed)}]\narchitecture = {sizes}\n"
            text += f"train = {{ seed = {seed}, {train} }}\nrounds = {{ {rounds} }}\n"
    return text


def name_of(way: str, seed: int) -> str:
    """The name of a student."""
    return f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"


def measured(work: Work, name: str) -> list[dict[str, Any]]:
    """Figures of both models of a student, on their own text and on the held-out store."""
    heldout = open_store(work.run.heldout)
    found = []
    for model, own in scored_texts(work.run.student(name)).values():
        figures = evaluate_own_text(name, model, open_store(own))
        loaded = load_model(str(model), name, precision="fp32")
        head = connect_head(loaded, heldout.manifest.tokenizer.size)
        isolation = student_isolation(loaded, heldout, name)
        means = measure_quality(head, isolation, heldout)[0].means()
        found.append(
            {
                "round": figures.round,
                "positions": figures.positions,
                "own_kl": figures.kl,
                "own_acceptance": figures.acceptance,
                "heldout_kl": means["kl"],
            }
        )
    return found


def show(report: Report) -> None:
    """Print remarks of the steps."""
    if report.note:
        print(f"{report.stage}: {report.note}", flush=True)


def main() -> None:
    """Train, write, score and measure; print means over seeds."""
    parser = argparse.ArgumentParser()
    for name, default in (
        ("seeds", 3), ("layers", 2), ("hidden", 128), ("steps", 450), ("later", 225),
        ("prompts", 640), ("heldout", 64), ("tokens", 128),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in ("teacher", "texts"):
        parser.add_argument(f"--{name}", type=Path)
    asked = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / "rounds.toml"
    path.write_text(recipe(asked), encoding="utf-8")
    coldstill.teacher_logits(path, runs=OUTPUT, report=show)
    work = open_work(path, (), OUTPUT, show)
    with quiet():
        finish_rounds(work)
        found = {
            way: [measured(work, name_of(way, seed)) for seed in range(asked.seeds)] for way in WAYS
        }
    for way, seeds in found.items():
        for number in (0, 1):
            each = [figures[number] for figures in seeds]
            kls = ", ".join(f"{one['own_kl']:.4f}" for one in each)
            mean = {key: statistics.mean(one[key] for one in each) for key in each[0]}
            print(
                f"{way:14} round {number + 1}: own text KL {mean['own_kl']:.4f} ({kls}), "
                f"acceptance {mean['own_acceptance']:.2%}, held-out KL {mean['heldout_kl']:.4f}"
            )
    figures = {"machine": describe_machine(), "asked": vars(asked), "ways": found}
    text = json.dumps(figures, indent=2, default=str)
    (OUTPUT / "rounds.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
