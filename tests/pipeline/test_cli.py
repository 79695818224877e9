"""The command line itself: words, options, exit codes, and what it does not load."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import coldstill
import pytest
from click.testing import CliRunner
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.cli import commands as cli
from coldstill.pipeline.cli.store import store

if TYPE_CHECKING:
    from desk import Desk

pytest_plugins = ("desk",)

SOURCE = Path(coldstill.__file__).parent
STORE: click.Group = store
COMMANDS = {name: command for name, command in cli.main.commands.items() if command is not STORE}
EVERY = COMMANDS | {f"store {name}": command for name, command in STORE.commands.items()}


def test_the_commands_are_those_that_are_promised() -> None:
    promised = "init plan train-teacher teacher-logits prune-student train-student evaluate sweep "
    promised += "compare report export inspect run"
    assert set(COMMANDS) == {*promised.split()}
    assert set(STORE.commands) == {"verify", "repair", "convert", "merge", "slice", "shrink"}


@pytest.mark.parametrize("name", EVERY)
def test_every_command_has_help_with_an_example_that_parses(name: str) -> None:
    command, called = EVERY[name], name.split()
    result = CliRunner().invoke(cli.main, [*called, "--help"])
    assert result.exit_code == 0
    examples = re.findall(r"Example: (coldstill .*)", result.output)
    assert len(examples) == 1
    words = shlex.split(examples[0])
    assert words[: 1 + len(called)] == ["coldstill", *called]
    command.make_context(name, words[1 + len(called) :])  # a usage error if it does not parse
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_also_a_make_target(name: str) -> None:
    makefile = (SOURCE / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z -]+):", makefile, re.MULTILINE)
    assert {name, "verify"} <= set(" ".join(targets).split())


def test_help_is_asked_for_in_any_usual_way() -> None:
    outputs = {CliRunner().invoke(cli.main, [flag]).output for flag in ("-h", "--help")}
    assert len(outputs) == 1
    assert "Offline distillation" in outputs.pop()
    version = CliRunner().invoke(cli.main, ["--version"])
    assert version.output.strip() == f"coldstill, version {coldstill.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["plan"],
        ["plan", "demo", "extra"],
        ["plan", "demo", "--sets", "a=1"],
        ["plan", "demo", "--set"],
        ["evaluate", "demo", "--student"],
        ["evaluate", "demo", "--student", "small", "--all"],
        ["train-student", "demo", "--all", "--student", "small"],
        ["sweep", "demo"],
        ["inspect"],
        ["init"],
    ],
    ids=" ".join,
)
def test_wrong_usage_ends_with_2_and_no_traceback(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 2
    assert re.search(r"^(Usage|Error): ", result.stderr)
    assert "Traceback" not in result.stderr


def test_a_misspelled_command_or_option_is_guessed() -> None:
    assert "'--set'" in CliRunner().invoke(cli.main, ["plan", "demo", "--sett", "a=1"]).stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ColdstillError("here: this"), 1, "error: here: this\n"),
        (ColdstillError("two\nlines"), 1, "error: two lines\n"),
        (OSError(28, "No space left on device"), 1, "error: disk: the disk is full; what was "),
        (OSError(28, "No space left on device", "x"), 1, "error: x: the disk is full; what was "),
        (PermissionError(13, "Permission denied", "x"), 1, "error: x: Permission denied\n"),
        (ConnectionError("no route"), 1, "error: no route\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to go on\n"),
    ],
)
def test_every_end_has_its_line_and_its_exit_code(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_work", stop)
    result = desk.coldstill("plan", "r.toml")
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("ours"), "unexpected KeyError in coldstill plan: KeyError: 'ours'; this is "),
        (
            TypeError("forward() got\nmore"),
            "unexpected TypeError in coldstill plan: forward() ",
        ),
        (RuntimeError(), "unexpected RuntimeError in coldstill plan: RuntimeError; "),
        (MemoryError(), "not enough memory (MemoryError); lower train.micro_batch_tokens or "),
        (RuntimeError("CUDA out of memory. Tried to"), "not enough memory (CUDA out of memory. "),
    ],
)
def test_a_fault_of_ours_is_one_line_that_says_how_to_see_more(
    error: Exception, told: str, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "_work", break_)
    monkeypatch.delenv("COLDSTILL_TRACEBACK", raising=False)
    line = desk.refused("plan", "r.toml")
    assert line.startswith(f"error: {told}")
    assert ("COLDSTILL_TRACEBACK=1" in line) == ("memory" not in told)
    monkeypatch.setenv("COLDSTILL_TRACEBACK", "1")
    if "memory" not in told:
        assert desk.coldstill("plan", "r.toml").exception is error


HEAVY = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "zarr")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan", "r.toml"],
        ["init", "new"],
        ["inspect", "runs/r/logits"],
        ["report", "r", "--no-continuations"],
    ],
    ids=lambda words: words[0],
)
def test_what_only_looks_never_loads_a_deep_learning_stack(
    finished: Desk, arguments: list[str]
) -> None:
    program = (
        "import sys\n"
        "from coldstill.pipeline.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded:', *[name for name in {HEAVY} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=finished.root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "loaded:"


def make(*arguments: str) -> list[str]:
    """What make would run, each as words; nothing is installed for it."""
    command = ["make", "-n", "--no-print-directory", "--old-file=.venv/.installed", *arguments]
    result = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    return [" ".join(words[1:]) for words in lines if words[0].endswith("/coldstill")]


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["demo"], "run demo"),
        (["teacher-logits"], "teacher-logits demo"),
        (
            ["teacher-logits", "RECIPE=x.toml", "SET=a.b=1 c.d=2"],
            "teacher-logits x.toml --set a.b=1 --set c.d=2",
        ),
        (
            ["train-student", "RECIPE=x", "SET=students.small.train.steps=1", "STUDENT=s"],
            "train-student x --set students.small.train.steps=1 --student s",
        ),
        (["evaluate", "RECIPE=x", "STUDENT=s t"], "evaluate x --student s --student t"),
        (["train-student", "RECIPE=x", "ALL=1"], "train-student x --all"),
        (["evaluate", "ALL=1"], "evaluate demo --all"),
        (
            ["sweep", "RECIPE=x", "GRID=students.a.train.steps=1,2 students.a.lora.rank=3,4"],
            "sweep x --grid students.a.train.steps=1,2 --grid students.a.lora.rank=3,4",
        ),
        (["compare", "RECIPE=runs/x"], "compare runs/x"),
        (["plan", "RECIPE=x"], "plan x"),
        (["train-teacher", "RECIPE=x", "SET=seed=2"], "train-teacher x --set seed=2"),
        (["run", "RECIPE=x"], "run x"),
        (
            ["export", "RECIPE=x", "STUDENT=s", "TO=hf onnx-int8"],
            "export x s --to hf --to onnx-int8",
        ),
        (["init", "RECIPE=mine"], "init mine"),
        (["inspect", "RECIPE=recipes/x.toml"], "inspect runs/x/logits"),
        (["inspect", "STORE=elsewhere"], "inspect elsewhere"),
    ],
)
def test_make_targets_run_the_commands_of_the_same_words(
    arguments: list[str], command: str
) -> None:
    assert make(*arguments) == [command]
    click_command = cli.main.commands[shlex.split(command)[0]]
    click_command.make_context(arguments[0], shlex.split(command)[1:])
