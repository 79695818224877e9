"""Run a recipe from Python, step by step, and read its results.

    python run_a_recipe.py RECIPE RUNS [KEY=VALUE ...]

RECIPE is a recipe's name, a TOML file or a run's folder; RUNS is the folder for the run. KEY=VALUE
overrides a key of the recipe, as --set does on the command line.
"""

import json
import sys

import coldstill
from coldstill.stages.report import Report

recipe, runs, *settings = sys.argv[1:]


def report(event: Report) -> None:
    """Print notes only; an event can also have counts, for a progress bar."""
    if event.note:
        print(f"{event.stage}: {event.note}")


# stage one: the teacher runs once
stores = coldstill.teacher_logits(recipe, settings=settings, runs=runs, report=report)
store = coldstill.open_store(stores.logits)
print(f"{len(store):,} sequences of {store.manifest.teacher.name}")

# stage two: students are trained and measured without the teacher
models = coldstill.train_students(recipe, settings=settings, runs=runs)
for name, figures in coldstill.evaluate(recipe, settings=settings, runs=runs).items():
    loss = json.loads(figures.read_text(encoding="utf-8"))["loss"]
    print(f"{name}: held-out loss {loss:.3f} nats, model in {models[name]}")

# or everything in one call, which keeps all finished steps
for row in coldstill.run(recipe, settings=settings, runs=runs):
    print(f"{row.name}: {row.parameters:,} parameters, KL {row.kl:.3f} nats from the teacher")
