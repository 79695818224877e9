"""Two lm-eval tasks on the students of a run: a cloze and a perplexity, made from texts.

`cloze` asks for the next word of a passage, among the right one and three words from other
passages. `prose` is the likelihood of whole passages, in bits per byte. The task files and their
data are written beside the run; then `coldstill evaluate --tasks` runs them on the teacher and all
students.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
from measure import OUTPUT
from small_tasks import PROSE, QUIZ, write_task

FOLDER = OUTPUT / "tasks"
CONTEXT, PASSAGES = 40, 100
"""Words of a passage before the one that is asked for, and number of passages."""


def passages(paths: list[Path]) -> list[str]:
    """The first texts that are long enough, from JSON lines with a column `text`."""
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").splitlines())
    texts = (json.loads(line)["text"] for line in lines)
    return [text for text in texts if len(text.split()) > 2 * CONTEXT][:PASSAGES]


@click.command(help=__doc__)
@click.argument("run")
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(run: str, texts: tuple[Path, ...]) -> None:
    """Write the tasks and run them."""
    chosen = passages(list(texts))
    random = np.random.default_rng(0)
    cloze = []
    for number, text in enumerate(chosen):
        words = text.split()
        others = random.choice([n for n in range(len(chosen)) if n != number], 3, replace=False)
        answers = [words[CONTEXT], *(chosen[n].split()[CONTEXT] for n in others)]
        order = random.permutation(4).tolist()
        cloze.append(
            {
                "question": " ".join(words[:CONTEXT]),
                "answers": [answers[n] for n in order],
                "right": order.index(0),
            }
        )
    write_task(FOLDER, "cloze", QUIZ, cloze)
    write_task(FOLDER, "prose", PROSE, [{"text": text} for text in chosen])
    command = [sys.executable, "-m", "coldstill.pipeline.cli", "evaluate", run]
    for models in (["--student", "teacher"], ["--all"]):
        subprocess.run([*command, *models, "--tasks", str(FOLDER)], check=True)


if __name__ == "__main__":
    main()
