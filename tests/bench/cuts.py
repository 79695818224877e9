"""What a cut of a real teacher loses before any training, and how large its sample must be.

Each part of SmolLM2-135M-Instruct is cut to 75, 50 and 25 % by importance, by the sum of its
squared weights, and at random (three draws, the median). The loss is that on held-out sequences.
Then parts are chosen from 32, 128, 512 and 1,024 sequences: `kept alike` is the share of the parts
that 1,024 sequences keep too.

The texts are those on the command line; by default the sources of Python's library. Results are
kept, so an interrupted benchmark continues.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import click
import torch
from coldstill.data.files import whole_file, write_json
from coldstill.data.store.reader import open_store
from coldstill.stages.models.isolation import student_isolation
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.students.pruning.anatomy import Sizes, anatomy_of
from coldstill.stages.students.pruning.cutting import Kept, cut, kept_parts
from coldstill.stages.students.pruning.importance import (
    CalibrationSet,
    Importance,
    calibration_set,
    measure_importance,
    sample_loss,
)
from measure import OUTPUT, write_rows
from real_teacher import captured_run, teacher_weights
from small_pruning import magnitude_importance, random_importance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coldstill.data.store.reader import StoreReader

FOLDER = OUTPUT / "cuts"
HELDOUT = 32
"""Held-out sequences on which every loss is measured."""
SAMPLES = (32, 128, 512, 1024)
DRAWS = (0, 1, 2)
CUTS = {
    "layers": [{"layers": 23}, {"layers": 15}, {"layers": 8}],
    "neurons": [{"feed_forward": 1152}, {"feed_forward": 768}, {"feed_forward": 384}],
    "channels": [{"hidden": 432}, {"hidden": 288}, {"hidden": 144}],
    "heads": [
        {"heads": 6, "kv_heads": 3},
        {"heads": 6, "kv_heads": 2},
        {"heads": 3, "kv_heads": 3},
        {"heads": 3, "kv_heads": 1},
    ],
}
RECIPE = """\
[corpus]
sequence_length = 128
holdout = 0.08
[logits]
tail = 12
sequences = 1024
shard_tokens = 16384
[evaluation]
sequences = 64
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Held-out losses after one cut, in nats."""

    part: str
    kept: str
    importance: float
    magnitude: float
    random: float
    by_sample: dict[str, float]
    """Loss by the number of sequences that importance was measured on."""
    kept_alike: dict[str, float]
    """Share of the kept parts that the largest sample keeps too."""


class Bench:
    """The teacher, its stores and the losses that are known."""

    def __init__(self, texts: list[str]) -> None:
        run = captured_run("cuts", texts, RECIPE)
        self._store, heldout = open_store(run / "logits"), open_store(run / "heldout")
        self._model = load_model(teacher_weights().name, "teacher", precision="fp32")
        self._vocabulary = heldout.manifest.tokenizer.size
        self._isolation = student_isolation(self._model, heldout, "teacher")
        self._heldout = self._sample(heldout, HELDOUT)
        shapes = {name: tuple(each.shape) for name, each in self._model.named_parameters()}
        config = self._model.config
        self.anatomy = anatomy_of(config.model_type, config.num_attention_heads, shapes, "teacher")
        self._path = FOLDER / "losses.json"
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._losses: dict[str, float] = (
            json.loads(self._path.read_text()) if self._path.exists() else {}
        )

    def _sample(self, store: StoreReader, count: int) -> CalibrationSet:
        return calibration_set(store, count, 0, self._isolation)

    def importance(self, sequences: int) -> Importance:
        """Scores from some sequences of the store; they are kept on disk."""
        path = FOLDER / f"importance-{sequences}.pt"
        if not path.exists():
            sample = self._sample(self._store, sequences)
            head = connect_head(self._model, self._vocabulary)
            loss = sample.teacher_loss()
            scores = measure_importance(head, self.anatomy, sample, "x", loss=loss)
            with whole_file(path) as scratch:
                torch.save(asdict(scores), scratch)
        return Importance(**torch.load(path))

    def magnitude(self) -> Importance:
        return magnitude_importance(self._model, self.anatomy)

    def whole(self) -> float:
        """The teacher's own held-out loss."""
        return self._heldout.teacher_loss()

    def loss(self, name: str, sizes: Sizes, scores: Importance) -> float:
        """Held-out loss after a cut by these scores; `name` identifies the scores."""
        key = f"{name} {sizes}"
        if key not in self._losses:
            kept = kept_parts(self.anatomy, sizes, scores)
            model = load_model(teacher_weights().name, "teacher", precision="fp32")
            small = connect_head(cut(model, self.anatomy, kept, "bench"), self._vocabulary)
            self._losses[key] = sample_loss(small, self._heldout, "x")
            write_json(self._path, self._losses)
            print(f"{key}: {self._losses[key]:.3f}", flush=True)
        return self._losses[key]


def _rows(bench: Bench) -> Iterator[Row]:
    scores = {count: bench.importance(count) for count in SAMPLES}
    magnitude = bench.magnitude()
    largest = scores[SAMPLES[-1]]
    for part, cuts in CUTS.items():
        for change in cuts:
            sizes = replace(bench.anatomy.sizes, **change)
            by_sample = {
                str(count): bench.loss(f"importance-{count}", sizes, scores[count])
                for count in SAMPLES
            }
            alike = {
                str(count): _alike(
                    kept_parts(bench.anatomy, sizes, scores[count]),
                    kept_parts(bench.anatomy, sizes, largest),
                    part,
                )
                for count in SAMPLES
            }
            chance = [
                bench.loss(f"random-{draw}", sizes, random_importance(bench.anatomy.sizes, draw))
                for draw in DRAWS
            ]
            yield Row(
                part=part,
                kept=", ".join(
                    f"{size} of {getattr(bench.anatomy.sizes, name)} {name}"
                    for name, size in change.items()
                ),
                importance=by_sample[str(SAMPLES[-1])],
                magnitude=bench.loss("magnitude", sizes, magnitude),
                random=statistics.median(chance),
                by_sample=by_sample,
                kept_alike=alike,
            )


def _alike(ours: Kept, theirs: Kept, part: str) -> float:
    """Share of the parts of one choice that the other choice keeps too."""
    pairs: list[tuple[Any, Any]] = {
        "layers": [(ours.layers, theirs.layers)],
        "channels": [(ours.hidden.tolist(), theirs.hidden.tolist())],
        "neurons": [
            (a.tolist(), b.tolist()) for a, b in zip(ours.neurons, theirs.neurons, strict=True)
        ],
        "heads": [(a.tolist(), b.tolist()) for a, b in zip(ours.heads, theirs.heads, strict=True)],
    }[part]
    both = sum(len(set(a) & set(b)) for a, b in pairs)
    return both / sum(len(a) for a, _ in pairs)


def table(whole: float, rows: list[Row]) -> str:
    """Two Markdown tables."""
    lines = [
        f"The whole model has {whole:.3f}.",
        "",
        "| kept | importance | magnitude | random |",
        "|---|---:|---:|---:|",
    ]
    lines += [
        f"| {row.kept} | {row.importance:.3f} | {row.magnitude:.3f} | {row.random:.3f} |"
        for row in rows
    ]
    counts = [f"{int(count):,}" for count in rows[0].by_sample]
    lines += [
        "",
        f"| kept | {' | '.join(f'loss, {n}' for n in counts)} | "
        f"{' | '.join(f'alike, {n}' for n in counts[:-1])} |",
        "|---|" + "---:|" * (2 * len(counts) - 1),
    ]
    for row in rows:
        losses = [f"{loss:.3f}" for loss in row.by_sample.values()]
        alike = [f"{share:.0%}" for share in list(row.kept_alike.values())[:-1]]
        lines.append(f"| {row.kept} | {' | '.join(losses)} | {' | '.join(alike)} |")
    return "\n".join(lines) + "\n"


@click.command(help=__doc__)
@click.argument("texts", nargs=-1)
def main(texts: tuple[str, ...]) -> None:
    """Measure what is missing, and print the tables."""
    bench = Bench(list(texts))
    rows = list(_rows(bench))
    write_rows("cuts", rows)
    text = table(bench.whole(), rows)
    (OUTPUT / "cuts.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
