"""What a README states and a machine can check: its code blocks, commands, paths and names.

A `sh` block runs in a folder with tiny recipes called `demo` and `my-run`, a `python` block runs
there too, and a `toml` block is read as a recipe or as part of one. `text` blocks show output.
"""

from __future__ import annotations

import contextlib
import re
import shlex
import shutil
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import coldstill
import pytest
import tomlkit
import yaml
from coldstill.pipeline.cli.commands import main
from coldstill.pipeline.recipe.reading import load_recipe
from conftest import sentences
from desk import RECIPE, Desk
from small_tasks import QUIZ, quiz, write_task

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(900)  # the pages run dozens of commands in one test

ROOT = Path(__file__).parents[1]
FRONT = "README.md"
ROOMS = ("pipeline/README.md", "stages/README.md", "data/README.md", "tests/README.md")
DOCUMENTS = (FRONT, *ROOMS, "data/FORMAT.md", "CONTRIBUTING.md", "CHANGELOG.md")

NOT_RUN = {
    "make install": "needs a package index",
    ". .venv/bin/activate": "changes only the shell that reads it",
    ".venv/bin/pre-commit install": "changes the repository's own hooks",
    "make test": "would run this test again",
    "make test TESTS=tests/data/test_order.py": "would run tests inside a test",
    'make test TESTS=tests/data/test_order.py ARGS="-k seed"': "would run tests inside a test",
    "make test-all": "would run this test again",
    "make test-vllm": "needs a package index and gigabytes",
    "make test-llama": "needs a package index; .ci/run runs it",
    "make check": "takes minutes; .ci/run runs it",
    "make mutants": "takes minutes",
    "coldstill store retokenize runs/demo/logits other --tokenizer my-student": (
        "needs a model with other tokens; test_student_tokens.py makes one"
    ),
    "make demo-smollm2": "needs a model of 98 MB and an hour",
    "make bench": "takes half an hour",
    "make gpu": "needs a GPU; test_gpu_script.py runs it at a small size",
    "make bench-quality": "takes half an hour",
    "make bench-quality TEACHER=smollm2 TEXTS=texts/": "needs a model of 98 MB and an hour",
    **dict.fromkeys(
        (
            "coldstill import logits/ store --tokenizer teacher/",
            "coldstill import logits/ store --tokenizer teacher/ --config compression_config.yaml",
            "coldstill import answers.jsonl store --tokenizer ORG/NAME --teacher ORG/NAME",
            "coldstill import states/ store --format hidden-states --tokenizer teacher/ "
            "--teacher teacher/ --tail 50",
            "coldstill import topk/ store --tokenizer teacher/ --tokens sequences.jsonl",
        ),
        "needs files of other projects; test_imports.py writes such files",
    ),
    "torchrun --nproc-per-node 8 --no-python coldstill teacher-logits my-run": (
        "needs eight processes; test_processes.py runs two"
    ),
    "torchrun --nproc-per-node 8 --no-python coldstill train-student my-run": (
        "needs eight processes; test_processes.py runs two"
    ),
    **dict.fromkeys(
        (f"coldstill rounds {name} my-run" for name in ("next", "write", "capture")),
        "needs a student with rounds; test_rounds.py runs it",
    ),
    "coldstill teacher-logits my-run --ray 10.0.0.1:6379 --workers 16 --gpus-per-worker 1": (
        "needs a cluster; test_ray.py makes one"
    ),
    "coldstill sweep my-run --grid students.small.train.steps=2,3 --ray --workers 2": (
        "needs ray; test_ray.py runs it"
    ),
}
"""Commands that do not run here, and why. For `make`, the dry run must still succeed."""
ELSEWHERE = {"data/FORMAT.md": "tests/data/test_plain_elsewhere.py runs its python blocks"}

BASE: dict[str, Any] = {
    "name": "base",
    "corpus": {"files": ["texts/"]},
    "teacher": {"model": "ORG/NAME"},
    "students": {
        "small": {
            "architecture": {"layers": 1, "hidden": 32, "heads": 2},
            "train": {"steps": 1},
        }
    },
}
"""What a `toml` block that shows a part of a recipe is merged into."""
PRUNED = """\
[students.pruned]
prune = { feed_forward = 32 }
train = { steps = 1, batch_tokens = 256 }
"""
"""A student for `coldstill prune-student`."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """One fenced block."""

    document: str
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return f"{self.document}:{self.line}"


def blocks(*documents: str) -> list[Fenced]:
    """All fenced blocks of some documents, in order."""
    found = []
    for document in documents:
        text = (ROOT / document).read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Fenced(document, line, match[1], match[2]))
    return found


def commands(block: Fenced) -> Iterator[tuple[str, list[str]]]:
    """Each command of a `sh` block: its text without the comment, and its words."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield re.sub(r"\s+#\s.*", "", line).strip(), words


def made(words: list[str]) -> list[list[str]]:
    """The `coldstill` commands that a `make` command would run."""
    command = [*words, "--dry-run", "--old-file=.venv/.installed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stderr)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    return [line[1:] for line in lines if line and line[0] == ".venv/bin/coldstill"]


@dataclass(slots=True)
class Shell:
    """A folder in which the commands of the documents run, each of them once."""

    desk: Desk
    finished: set[str] = field(default_factory=set)

    def recipe(self, name: str, seed: int) -> str:
        """A tiny recipe with its own texts and the students `small` and `baseline`."""
        for i, text in enumerate(sentences(60, seed)):
            self.desk.write(f"{name}-texts/{i:02d}.txt", text)
        text = RECIPE.format(texts=f"{name}-texts", teacher='model = "teacher"')
        return text.replace('name = "r"', f'name = "{name}"') + PRUNED

    def run(self, document: str) -> int:
        """Run the `sh` and `python` blocks of a document in order; returns how many it has."""
        names: dict[str, Any] = {}
        count = 0
        for block in blocks(document):
            count += block.language in ("sh", "python")
            if block.language == "sh":
                for text, words in commands(block):
                    self._command(text, words, block)
            elif block.language == "python" and document not in ELSEWHERE:
                self._prepare_stores()
                with contextlib.chdir(self.desk.root):
                    exec(compile(block.text, block.name, "exec"), names)
        return count

    def _command(self, text: str, words: list[str], block: Fenced) -> None:
        if text in self.finished:
            return
        self.finished.add(text)
        if words[0] == "make":
            found = made(words)
            if text not in NOT_RUN:
                assert found, f"{block.name}: {text} runs no coldstill command"
                for arguments in found:
                    self.desk.done(*arguments)
        elif text not in NOT_RUN:
            assert words[0] == "coldstill", f"{block.name}: {text} neither runs nor is in NOT_RUN"
            self.desk.done(*words[1:])
            if words[1:] == ["init", "my-run"]:
                # the recipe that `init` writes names no real texts and no real model
                self.desk.write("my-run.toml", self.recipe("my-run", 1))

    def _prepare_stores(self) -> None:
        """Stores under the names that the documents use for reading without coldstill."""
        if not (self.desk.root / "logits").exists():
            shutil.copytree(self.desk.root / "runs/demo/heldout", self.desk.root / "logits")
            to_zarr = ("zarr-logits", "--store", "zarr", "--codec", "plain")
            self.desk.done("store", "convert", "runs/demo/logits", *to_zarr)


@pytest.fixture
def shell(tmp_path: Path, teacher_folder: Path) -> Shell:
    """A folder with a tiny recipe called `demo`, its teacher, and a task file for lm-eval."""
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    shell = Shell(Desk(tmp_path))
    shell.desk.write("demo.toml", shell.recipe("demo", 0))
    write_task(tmp_path / "tasks", "quiz", QUIZ, quiz(4))
    return shell


def test_every_block_of_the_front_page_runs(shell: Shell) -> None:
    assert shell.run(FRONT) >= 5


@pytest.mark.slow
def test_every_block_of_the_other_pages_runs(shell: Shell) -> None:
    shell.desk.done("run", "demo")
    assert sum(shell.run(document) for document in DOCUMENTS[1:]) >= 10


def merged(base: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Two tables as one; the part wins."""
    result = dict(base)
    for key, value in part.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = merged(base[key], value) if both else value
    return result


def test_every_recipe_is_valid(tmp_path: Path) -> None:
    shown = [block for block in blocks(*DOCUMENTS) if block.language == "toml"]
    assert len(shown) > 5
    for block in shown:
        table = tomllib.loads(block.text)
        text = block.text if "name" in table else tomlkit.dumps(merged(BASE, table))
        path = tmp_path / f"{block.document.replace('/', '-')}-{block.line}.toml"
        path.write_text(text, encoding="utf-8")
        load_recipe(str(path))


def test_every_block_has_a_language_and_every_exception_is_used() -> None:
    shown = blocks(*DOCUMENTS)
    known = {"sh", "python", "toml", "text"}
    assert [block.name for block in shown if block.language not in known] == []
    used = {text for block in shown if block.language == "sh" for text, _ in commands(block)}
    assert set(NOT_RUN) - used == set()


def prose(document: str) -> str:
    """A document without its fenced blocks."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def found_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that some words name, and the words behind it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_options_in_the_text_exist(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+)(?=.*:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for quoted in re.findall(r"`((?:coldstill|make) [^`]+)`", prose(document)):
        program, *words = shlex.split(quoted)
        if program == "make":
            assert {word for word in words if "=" not in word} <= targets, quoted
            continue
        command, rest = found_command(words)
        assert not isinstance(command, click.Group) or not rest or rest[0].startswith("-"), quoted
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= options, quoted


def leaves(group: click.Group, prefix: str = "coldstill") -> Iterator[str]:
    """Every command by its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}"


def test_every_command_is_shown_in_the_room_pages() -> None:
    text = "".join((ROOT / room).read_text(encoding="utf-8") for room in ROOMS)
    assert [name for name in leaves(main) if f"{name} " not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_in_the_text_exist(document: str) -> None:
    folder = (ROOT / document).parent
    text = prose(document)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (folder / link).exists()] == []
    quoted = re.findall(r"`([\w./-]+(?:/|\.py))`", text)
    paths = [path for path in quoted if not path.startswith(("runs/", "claims/", "tokenizer/"))]
    missing = [p for p in paths if not (ROOT / p).exists() and not (folder / p).exists()]
    assert missing == []


def test_the_front_page_is_one_page() -> None:
    lines = (ROOT / FRONT).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == coldstill.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", changes, re.MULTILINE)[0] == coldstill.__version__


def test_the_hooks_before_a_commit_run_what_make_check_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert all(repository["repo"] == "local" for repository in config["repos"])
    assert {hook["language"] for hook in hooks} == {"system"}
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks:
        program, *words = hook["entry"].split()
        if program == "make":
            assert f"check: lint {words[0]}" in rules
        else:
            assert f"{program.replace('.venv/bin', '$(BIN)')} {words[0]}" in rules
