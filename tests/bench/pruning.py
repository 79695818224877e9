"""What pruning gains over training from random weights.

Students with a half and a quarter of the demo teacher's parameters train for the same steps from
its record of 160 sequences. One starts from the pruned teacher, the other has the same tensors with
random weights. Each gets two learning rates, and the better result counts. A quarter is also cut in
two rounds of half the steps each.

`KL` and `loss` are those on held-out documents. `steps` is the first logged step at which the
pruned student's training KL is below the final one of the other student.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch
from coldstill.stages.models.loading import load_model, load_tokenizer
from distributions import trained_reading
from measure import OUTPUT, Figure, figure, write
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

STEPS = 250
RATES = ("1e-3", "4e-3")
SHARES = ("50%", "25%")
RECIPE = """\
name = "pruning"
[corpus]
files = ["stdlib:"]
sequence_length = 256
holdout = 0.03
[teacher]
model = "./demo/teacher/model"
[logits]
sequences = 160
shard_tokens = 16384
[evaluation]
sequences = 100
"""


def main() -> None:
    """Print and write the figures."""
    trained_reading()  # trains the teacher if it is missing
    recipe = OUTPUT / "pruning.toml"
    recipe.write_text(RECIPE + "".join(_students()), encoding="utf-8")
    _coldstill("teacher-logits", recipe)
    for share in SHARES:
        _coldstill("prune-student", recipe, *_each("pruned", share))
        _unpruned(share)
        for start in ("pruned", "random"):
            _coldstill("train-student", recipe, *_each(start, share))
    _coldstill("train-student", recipe, *_each("twice", SHARES[-1]))
    _coldstill("evaluate", recipe)
    figures = [figure for share in SHARES for figure in _compared("pruned", share)]
    write("pruning", [*figures, *_compared("twice", SHARES[-1])])


def _students() -> list[str]:
    starts = [("pruned", f'prune = {{ parameters = "{share}" }}', share, STEPS) for share in SHARES]
    starts += [
        ("random", f'model = "./pruning/{_folder(share)}"', share, STEPS) for share in SHARES
    ]
    cuts = ", ".join(f'{{ parameters = "{share}" }}' for share in SHARES)
    starts.append(("twice", f"prune = [{cuts}]", SHARES[-1], STEPS // 2))
    return [
        f"[students.{_name(start, share, rate)}]\n{origin}\ntrain = {{ steps = {steps}, "
        f"batch_tokens = 1024, learning_rate = {rate}, log_every = 10 }}\n"
        for start, origin, share, steps in starts
        for rate in RATES
    ]


def _unpruned(share: str) -> None:
    """Save random weights in the sizes of the pruned student."""
    folder = OUTPUT / "pruning" / _folder(share)
    if folder.is_dir():
        return
    start = _student("pruned", share, RATES[0]) / "start"
    pruned = load_model(str(start), "bench", precision="fp32")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(pruned.config, dtype=torch.float32)
    assert model.num_parameters() == pruned.num_parameters()
    load_tokenizer(str(OUTPUT / "demo" / "teacher" / "model"), "bench").save_pretrained(folder)
    model.save_pretrained(folder)


def _compared(start: str, share: str) -> list[Figure]:
    """The better student of one start against the better one from random weights."""
    ours, baseline = (_better(which, share) for which in (start, "random"))
    records = [json.loads((folder / "evaluation.json").read_text()) for folder in (ours, baseline)]
    name = f"{start} to {share} against random weights"

    figures = [
        figure(f"{name}, held-out {key}", records[0][key], records[1][key], "nat")
        for key in ("kl", "loss")
    ]
    if start == "pruned":
        lines, end = _metrics(ours), _metrics(baseline)[-1]
        step = next((line["step"] for line in lines if line["kl"] <= end["kl"]), lines[-1]["step"])
        figures.append(figure(f"{name}, steps", step, end["step"], ""))
    return figures


def _better(start: str, share: str) -> Path:
    folders = [_student(start, share, rate) for rate in RATES]
    return min(folders, key=lambda f: json.loads((f / "evaluation.json").read_text())["kl"])


def _metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _each(start: str, share: str) -> list[str]:
    return [part for rate in RATES for part in ("--student", _name(start, share, rate))]


def _student(start: str, share: str, rate: str) -> Path:
    return OUTPUT / "pruning" / "students" / _name(start, share, rate)


def _name(start: str, share: str, rate: str) -> str:
    return f"{start}-{share.rstrip('%')}-{rate}"


def _folder(share: str) -> str:
    return f"random-{share.rstrip('%')}"


def _coldstill(command: str, recipe: Path, *arguments: str) -> None:
    words = [
        sys.executable,
        "-m",
        "coldstill.pipeline.cli.commands",
        command,
        str(recipe),
        *arguments,
    ]
    subprocess.run([*words, "--runs", str(OUTPUT)], check=True)


if __name__ == "__main__":
    main()
