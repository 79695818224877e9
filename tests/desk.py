"""The command line in a temporary folder, for the tests of the pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from coldstill.pipeline.cli.commands import main

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from signal import Signals

    from click.testing import Result

RECIPE = """\
name = "r"
[corpus]
files = ["{texts}"]
sequence_length = 32
holdout = 0.2
[teacher]
{teacher}
[logits]
head = 4
tail = 4
shard_tokens = 640
[evaluation]
head = 16
tail = 8
sequences = 12
[students.small]
architecture = {{ layers = 1, hidden = 32, heads = 2 }}
train = {{ steps = 3, batch_tokens = 256, log_every = 1, checkpoint_every = 1 }}
[students.baseline]
like = "small"
objective = {{ kl = 0.0, cross_entropy = 1.0 }}
"""


@dataclass(frozen=True, slots=True)
class Desk:
    """A folder in which commands run."""

    root: Path

    @property
    def run(self) -> Path:
        """The run of the recipe `r.toml`."""
        return self.root / "runs" / "r"

    def coldstill(self, *arguments: str) -> Result:
        """Run a command and return its result."""
        with contextlib.chdir(self.root):
            return CliRunner().invoke(main, arguments)

    def done(self, *arguments: str) -> Result:
        """Run a command that must succeed."""
        result = self.coldstill(*arguments)
        assert result.exit_code == 0, (result.stderr, result.exception)
        return result

    def refused(self, *arguments: str) -> str:
        """Run a command that must fail in one line and change no file; return that line."""
        before = self.snapshot()
        result = self.coldstill(*arguments)
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 1, result.output
        *before_it, line = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert not any(text.startswith("error: ") for text in before_it)
        assert "Traceback" not in result.output
        assert result.stdout == ""
        assert self.snapshot() == before
        return line

    def torchrun(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in two processes of one `torchrun`."""
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "coldstill.pipeline.cli", *arguments,
        ]  # fmt: skip
        return subprocess.run(
            command,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )

    def snapshot(self) -> dict[str, tuple[str, int]]:
        """The hash and the modification time of every file."""
        files = (path for path in sorted(self.root.rglob("*")) if path.is_file())
        return {
            str(path.relative_to(self.root)): (
                hashlib.sha256(path.read_bytes()).hexdigest(),
                path.stat().st_mtime_ns,
            )
            for path in files
        }

    def write(self, name: str, content: str | bytes) -> Path:
        """Write a file into the folder."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def edit(self, old: str, new: str) -> None:
        """Replace text in the recipe."""
        path = self.root / "r.toml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")

    def json(self, *path: str) -> Any:
        """A JSON file of the run."""
        return json.loads(self.run.joinpath(*path).read_text(encoding="utf-8"))


_DOOR = """
import gc, json, os, sys
import torch
import coldstill.pipeline.recipe.work
import coldstill.stages.teacher_logits
import coldstill.stages.train_student
from coldstill.pipeline.cli import main
torch.set_num_threads(1)  # as in the tests' own process: another number may round otherwise
gc.freeze()  # the collector of each child then leaves out what was imported here
for line in sys.stdin:
    folder, output, arguments, environments = json.loads(line)
    children = []
    for environment in environments:
        children.append(os.fork())
        if not children[-1]:
            os.environ |= environment
            os.chdir(folder)
            screen = os.open(output, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            for descriptor in (0, 1, 2):
                os.dup2(screen, descriptor)
            sys.argv = ["coldstill", *arguments]
            main(arguments)
            sys.exit(0)
    print(children[0], flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(next((code for code in codes if code), 0), flush=True)
"""
"""A process that starts children for each line it reads, one per environment: torch, which takes
seconds, loads once."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Commands in real processes, for tests of signals and terminals."""

    door: subprocess.Popen[str]

    def begin(
        self,
        desk: Desk,
        output: str,
        *arguments: str,
        environments: Sequence[dict[str, str]] = ({},),
    ) -> int:
        """Start a command in a folder; returns its process id, or that of the first of several.

        environments  further variables of each of its processes
        """
        assert self.door.stdin is not None
        order = [str(desk.root), output, arguments, environments]
        self.door.stdin.write(json.dumps(order) + "\n")
        self.door.stdin.flush()
        return self._answer()

    def end(self) -> int:
        """Wait for the command; returns its exit code, or the negative number of a signal."""
        return self._answer()

    def stopped(
        self, desk: Desk, how: Signals, sign: Path, *arguments: str
    ) -> tuple[int, list[str]]:
        """Send a signal once the file `sign` exists; returns exit code and output lines."""
        output = desk.root.parent / f"{desk.root.name}.output"
        process = self.begin(desk, str(output), *arguments)
        deadline = time.monotonic() + 60
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process, how)
        return self.end(), output.read_text(encoding="utf-8").splitlines()

    def together(self, desk: Desk, *arguments: str) -> tuple[int, str]:
        """Run a command in two processes as `torchrun` does; returns exit code and output.

        They have the variables that `torchrun` sets, but need not load torch.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        output = desk.root.parent / f"{desk.root.name}.output"
        environments = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            }
            for rank in range(2)
        ]
        self.begin(desk, str(output), *arguments, environments=environments)
        return self.end(), output.read_text(encoding="utf-8")

    def _answer(self) -> int:
        assert self.door.stdout is not None
        return int(self.door.stdout.readline())


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Real processes that start fast."""
    command = [sys.executable, "-c", _DOOR]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as door:
        yield Processes(door)
        assert door.stdin is not None
        door.stdin.close()


@pytest.fixture
def make_desk() -> type[Desk]:
    """The class, to make a desk in any folder."""
    return Desk


@pytest.fixture
def desk(tmp_path: Path, texts: Path, teacher_folder: Path) -> Desk:
    """A desk with the recipe `r.toml` on it: a teacher from a folder, two students."""
    desk = Desk(tmp_path)
    desk.write("r.toml", RECIPE.format(texts=texts, teacher=f'model = "{teacher_folder}"'))
    return desk


@pytest.fixture(scope="session")
def _finished(
    tmp_path_factory: pytest.TempPathFactory, texts: Path, teacher_folder: Path
) -> tuple[Desk, Result]:
    desk = Desk(tmp_path_factory.mktemp("finished"))
    # its own copy of the teacher, so that a test may remove it
    shutil.copytree(teacher_folder, desk.root / "teacher")
    desk.write("r.toml", RECIPE.format(texts=texts, teacher='model = "teacher"'))
    return desk, desk.done("run", "r.toml")


@pytest.fixture
def finished(_finished: tuple[Desk, Result], tmp_path: Path) -> Desk:
    """A desk after `coldstill run r.toml`; its teacher is the folder `teacher`."""
    shutil.copytree(_finished[0].root, tmp_path, dirs_exist_ok=True)
    return Desk(tmp_path)


@pytest.fixture
def first_run(_finished: tuple[Desk, Result]) -> Result:
    """The output of `coldstill run r.toml`."""
    return _finished[1]
