"""The command line itself: words, options, exit codes, and which libraries it loads."""

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
from coldstill.pipeline.cli.group import SECTIONS
from coldstill.pipeline.cli.launch import launch
from coldstill.pipeline.cli.options import NEXT
from coldstill.pipeline.cli.rounds import rounds
from coldstill.pipeline.cli.store import store

if TYPE_CHECKING:
    from click.testing import Result
    from desk import Desk

pytest_plugins = ("desk",)

SOURCE = Path(coldstill.__file__).parent
GROUPS: dict[str, click.Group] = {"store": store, "launch": launch, "rounds": rounds}
COMMANDS = {name: command for name, command in cli.main.commands.items() if name not in GROUPS}
EVERY = COMMANDS | {
    f"{group} {name}": command
    for group, commands in GROUPS.items()
    for name, command in commands.commands.items()
}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, arguments)


def test_the_list_of_commands_is_grouped_and_cuts_no_help() -> None:
    promised = "init plan recipe-help train-teacher teacher-logits prune-student train-student "
    promised += "evaluate sweep compare report export import inspect run"
    assert set(COMMANDS) == {*promised.split()}
    tools = "verify repair convert merge slice shrink retokenize"
    assert set(store.commands) == {*tools.split()}
    assert set(launch.commands) == {"slurm", "sky"}
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(cli.main.commands)
    outputs = {invoke("-h").output, invoke("--help").output}
    assert len(outputs) == 1
    text = outputs.pop()
    assert "Offline distillation" in text
    assert re.findall(r"^(\S.*):$", text, re.MULTILINE) == ["Options", *SECTIONS]
    assert re.findall(r"^  ([a-z][a-z-]+)  ", text, re.MULTILINE) == listed
    for page in (text, *(invoke(group, "--help").output for group in GROUPS)):
        assert "..." not in page.partition("\n")[2]
    assert invoke("--version").output.strip() == f"coldstill, version {coldstill.__version__}"


def test_every_command_has_help_with_an_example_that_parses() -> None:
    for name, command in EVERY.items():
        called = name.split()
        result = invoke(*called, "--help")
        assert result.exit_code == 0
        (example,) = re.findall(r"Example: (coldstill .*)", result.output)
        words = shlex.split(example)
        assert words[: 1 + len(called)] == ["coldstill", *called]
        command.make_context(name, words[1 + len(called) :])  # a usage error if it does not parse
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts}"
    assert set(NEXT) | set(NEXT.values()) <= set(COMMANDS)


def test_wrong_usage_ends_with_2_and_no_traceback() -> None:
    for line in (
        "", "nonsense", "plan", "plan demo extra", "plan demo --sets a=1", "plan demo --set",
        "evaluate demo --student", "evaluate demo --student small --all",
        "train-student demo --all --student small", "sweep demo", "inspect", "init",
    ):  # fmt: skip
        result = invoke(*line.split())
        assert isinstance(result.exception, SystemExit), line
        assert result.exit_code == 2, line
        assert re.search(r"^(Usage|Error): ", result.stderr)
        assert "Traceback" not in result.stderr
        assert ("'--set'" in result.stderr) == ("--set" in line), "the nearest option is named"


def test_every_error_has_its_line_and_its_exit_code(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = "the disk is full; finished "
    unexpected = "error: unexpected {0} in coldstill plan: {0}"
    cases: tuple[tuple[BaseException, int, str], ...] = (
        (ColdstillError("here: this"), 1, "error: here: this\n"),
        (ColdstillError("two\nlines"), 1, "error: two lines\n"),
        (OSError(28, "No space left on device"), 1, f"error: disk: {full}"),
        (OSError(28, "No space left on device", "x"), 1, f"error: x: {full}"),
        (PermissionError(13, "Permission denied", "x"), 1, "error: x: Permission denied\n"),
        (ConnectionError("no route"), 1, "error: no route\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
        (KeyError("ours"), 1, unexpected.format("KeyError") + ": 'ours'; "),
        (TypeError("f() got\nmore"), 1, "error: unexpected TypeError in coldstill plan: f() "),
        (RuntimeError(), 1, unexpected.format("RuntimeError") + "; "),
        (MemoryError(), 1, "error: not enough memory (MemoryError); lower train.micro_batch_"),
        (RuntimeError("CUDA out of memory. Tr"), 1, "error: not enough memory (CUDA out of mem"),
    )
    for error, code, message in cases:

        def stop(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(cli, "work_of", stop)
        monkeypatch.delenv("COLDSTILL_TRACEBACK", raising=False)
        result = desk.coldstill("plan", "r.toml")
        assert isinstance(result.exception, SystemExit)
        assert result.exit_code == code
        assert result.stderr.startswith(message)
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""
        if "unexpected" in message:
            assert "run it again with COLDSTILL_TRACEBACK=1 for the traceback" in result.stderr
            monkeypatch.setenv("COLDSTILL_TRACEBACK", "1")
            assert desk.coldstill("plan", "r.toml").exception is error


HEAVY = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "zarr")


@pytest.mark.slow
def test_commands_that_only_read_never_load_a_deep_learning_stack(finished: Desk) -> None:
    lines = [
        "--help",
        "recipe-help",
        "plan r.toml",
        "init new",
        "inspect runs/r/logits",
        "report r --no-continuations",
    ]
    with_tokens = ["inspect runs/r --sequence 0", "inspect runs/r --html p.html"]
    program = (
        "import sys\n"
        "from coldstill.pipeline.cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    try:\n        main(line.split())\n"
        "    except SystemExit as end:\n        assert not end.code, (line, end.code)\n"
        f"    print('loaded by', line, [name for name in {HEAVY} if name in sys.modules])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *lines, *with_tokens],
        cwd=finished.root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    loaded = [line for line in result.stdout.splitlines() if line.startswith("loaded by")]
    expected = [f"loaded by {line} []" for line in lines]
    assert loaded == expected + [f"loaded by {line} ['tokenizers']" for line in with_tokens]


def make(*arguments: str) -> list[str]:
    """Return the coldstill commands that make would run, without `coldstill`."""
    command = ["make", "-n", "--no-print-directory", "--old-file=.venv/.installed", *arguments]
    result = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    return [" ".join(words[1:]) for words in lines if words[0].endswith("/coldstill")]


def test_make_targets_run_the_commands_of_the_same_words() -> None:
    makefile = (SOURCE / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z -]+):", makefile, re.MULTILINE)
    assert (set(COMMANDS) | {"verify"}) - {"recipe-help"} <= set(" ".join(targets).split())
    steps = "students.a.train.steps=1"
    for words, command in (
        (["demo"], "run demo"),
        (["teacher-logits"], "teacher-logits demo"),
        (
            ["teacher-logits", "RECIPE=x.toml", "SET=a.b=1 c.d=2"],
            "teacher-logits x.toml --set a.b=1 --set c.d=2",
        ),
        (
            ["train-student", "RECIPE=x", f"SET={steps}", "STUDENT=s"],
            f"train-student x --set {steps} --student s",
        ),
        (["evaluate", "RECIPE=x", "STUDENT=s t"], "evaluate x --student s --student t"),
        (["train-student", "RECIPE=x", "ALL=1"], "train-student x --all"),
        (["evaluate", "ALL=1"], "evaluate demo --all"),
        (
            ["sweep", "RECIPE=x", f"GRID={steps},2 students.a.lora.rank=3,4"],
            f"sweep x --grid {steps},2 --grid students.a.lora.rank=3,4",
        ),
        (["compare", "RECIPE=runs/x"], "compare runs/x"),
        (["plan", "RECIPE=x"], "plan x"),
        (["train-teacher", "RECIPE=x", "SET=seed=2"], "train-teacher x --set seed=2"),
        (["run", "RECIPE=x"], "run x"),
        (
            ["import", "SOURCE=a/ b/", "STORE=s", "TOKENIZER=t", "CONFIG=c.yaml"],
            "import a/ b/ s --tokenizer t --config c.yaml",
        ),
        (
            ["export", "RECIPE=x", "STUDENT=s", "TO=hf onnx-int8"],
            "export x s --to hf --to onnx-int8",
        ),
        (["init", "RECIPE=mine"], "init mine"),
        (["inspect", "RECIPE=recipes/x.toml"], "inspect runs/x/logits"),
        (["inspect", "STORE=elsewhere"], "inspect elsewhere"),
    ):
        assert make(*words) == [command]
        first, *options = shlex.split(command)
        cli.main.commands[first].make_context(first, options)
