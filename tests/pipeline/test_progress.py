"""Progress: bars on a terminal, and plain lines at growing intervals in a log."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.pipeline.cli import progress as progress_lines
from coldstill.pipeline.cli.progress import Bars, Lines, Progress
from coldstill.pipeline.units import duration, rate
from coldstill.stages.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from desk import Desk, Processes

pytest_plugins = ("desk",)


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def drawn() -> Iterator[tuple[Progress, Terminal]]:
    """A reporter that draws on a terminal."""
    with contextlib.redirect_stderr(Terminal()) as terminal, Progress() as progress:
        yield progress, terminal


def bar_of(progress: Progress) -> Any:
    """The bar that is on the terminal now."""
    assert isinstance(progress._drawn, Bars)
    return progress._drawn.bar


def step(done: int, total: int = 4000, stage: str = "teacher-logits", **figures: float) -> Report:
    """A step of 1000 tokens."""
    return Report(stage=stage, done=done, total=total, step=1000, figures=figures)


def test_without_a_terminal_there_are_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    beware = Report(stage="corpus", note="beware", warning=True)
    with Progress() as progress:
        for done in (0, 1000, 2000, 4000):
            progress(step(done))
        for stage in ("corpus", "other", "corpus"):  # a stage's note is printed once
            progress(Report(stage=stage, note="three documents"))
        progress(beware)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "teacher-logits: starts, 0 of 4,000 tokens\n"
        "corpus: three documents\nother: three documents\n"
        "corpus: warning: beware\n"
    )
    # of several processes, the others print warnings only
    monkeypatch.setenv("RANK", "1")
    with Progress() as progress:
        progress(step(1000))
        progress(Report(stage="corpus", doing="look the sources up"))
        progress(beware)
    assert capsys.readouterr().err == "corpus: warning: beware\n"


def test_a_step_without_counts_is_shown_until_the_next_one() -> None:
    with drawn() as (progress, terminal):
        progress(Report(stage="teacher-logits", doing="load the teacher"))
        assert terminal.getvalue().endswith("teacher-logits: load the teacher")
        progress(step(1000))
        progress(Report(stage="teacher-logits", doing="save a checkpoint"))
        progress(step(2000))
        assert bar_of(progress).n == 2000
    assert "load the teacher" not in terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert terminal.getvalue().count("\n") == 1  # of the bar that stays


def test_on_a_terminal_a_bar_shows_rate_time_left_and_figures() -> None:
    with drawn() as (progress, terminal):
        progress(step(1000))
        bar_of(progress).start_t -= 5  # as if it had taken a while
        bar_of(progress).last_print_t -= 5
        progress(step(2000, loss=3.25))
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("teacher-logits:  50%")
    assert "2.00k/4.00k" in last
    assert re.search(r"\[00:05<\d\d:\d\d, ", last)
    assert "tokens/s" in last
    assert "loss=3.25" in last
    with drawn() as (progress, terminal):
        progress(step(3000))  # a resumed bar starts where the work resumes
        assert (bar_of(progress).initial, bar_of(progress).n) == (2000, 3000)
        progress(Report(stage="teacher-logits", note="look"))
        progress(Report(stage="corpus", done=256, unit="documents"))
        progress(Report(stage="choice", part="pass 1 of 2", done=1, total=2, step=1))
        first = bar_of(progress)
        progress(Report(stage="choice", part="pass 2 of 2", done=2, total=2, step=1))
        assert bar_of(progress) is first  # passes share a bar
    text = terminal.getvalue()
    assert "\nteacher-logits: look\n" in text  # a note is a whole line
    assert re.search(r"corpus: 256 documents \[", text)
    assert "pass 2 of 2" in text


def test_each_stage_has_its_own_bar_and_the_last_is_closed() -> None:
    with drawn() as (progress, terminal):
        progress(step(4000, stage="a"))
        first = bar_of(progress)
        progress(step(1000, stage="b"))
        assert bar_of(progress) is not first
        second = bar_of(progress)
        assert first.disable  # what tqdm sets on closing
        assert not second.disable
    assert second.disable
    assert terminal.getvalue().endswith("\n")


def test_the_bar_is_closed_when_the_work_fails() -> None:
    def fail(progress: Progress) -> None:
        progress(step(1000))
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), drawn() as (progress, terminal):
        fail(progress)
    assert terminal.getvalue().endswith("\n")


def on_a_terminal(processes: Processes, desk: Desk, *arguments: str) -> tuple[str, int]:
    """The output of a command on a real terminal, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    processes.begin(desk, os.ttyname(theirs), *arguments)
    output = b""
    while not re.search(rb"\nnext: .*\r\n$", output) and select.select([ours], [], [], 60)[0]:
        output += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    return output.decode(), processes.end()


@pytest.mark.slow
def test_a_real_terminal_gets_bars_and_whole_lines(desk: Desk, processes: Processes) -> None:
    output, code = on_a_terminal(
        processes, desk, "teacher-logits", "r.toml", "--set", "logits.sequences=8"
    )
    assert code == 0, output
    for stage in ("corpus", "teacher-logits heldout", "teacher-logits train"):
        assert re.search(rf"\r{stage}: .*\d+%|\r{stage}: [\d.]+ documents", output), stage
    assert "tokens/s" in output
    assert output.endswith("\r\n")
    lines = output.replace("\r\n", "\n").splitlines()
    assert re.fullmatch(r"teacher-logits train: \d+ shards? in runs/r/logits", lines[-2])


STAGE = "teacher-logits train"
TOTAL = 131072


class Log:
    """Lines, with a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0
        self.written: list[str] = []
        self.lines = Lines(self.written.append, "plan", lambda: self.now)

    def take(self, done: int, stage: str = STAGE, *, total: int = TOTAL, **more: object) -> None:
        """A report of a stage that counts."""
        self.lines.take(Report(stage=stage, done=done, total=total, **more))  # type: ignore[arg-type]

    def doing(self, what: str, stage: str = STAGE) -> None:
        """A report of a step that is not counted."""
        self.lines.take(Report(stage=stage, doing=what))

    def wait(self, seconds: float) -> list[str]:
        """The lines that are written while nothing is reported."""
        del self.written[:]
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            self.lines.tick()
        return list(self.written)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(progress_lines, "INTERVALS", (10.0, 30.0, 60.0))
    monkeypatch.setattr(progress_lines, "BRIEF", 2.0)
    return Log()


def test_a_stage_reports_its_start_its_progress_and_its_end(log: Log) -> None:
    log.take(0)
    assert log.written == [f"{STAGE}: starts, 0 of 131,072 tokens"]
    assert log.wait(9) == []
    assert log.wait(2) == [f"{STAGE}: 0 of 131,072 tokens, 10 s so far"]
    log.take(4096, figures={"loss": 3.25})
    assert log.wait(30) == [
        f"{STAGE}: 4,096 of 131,072 tokens, 102 tokens/s, 20 min 40 s left, loss 3.25"
    ]
    log.take(TOTAL)
    assert log.written[1:] == [f"{STAGE}: 131,072 of 131,072 tokens in 41 s, 3,197 tokens/s"]
    log.now += 12
    log.take(0)
    log.now += 12
    log.take(12288, step=12288)
    assert log.written[-1] == f"{STAGE}: 12,288 of 131,072 tokens, 1,024 tokens/s, 1 min 56 s left"


def test_lines_come_after_10_and_another_30_seconds_and_then_every_minute(log: Log) -> None:
    log.take(0)
    began, times = log.now, []
    for done in range(1, 1200):
        log.now = began + done / 4
        before = len(log.written)
        log.take(done)
        times += [log.now - began] * (len(log.written) - before)
    assert times == [10, 40, 100, 160, 220, 280]


def test_a_short_stage_has_one_line(log: Log) -> None:
    for stage in (STAGE, STAGE, "evaluate small"):
        log.take(0, stage)
        log.take(TOTAL, stage)
    first = f"{STAGE}: starts, 0 of 131,072 tokens"
    assert log.written == [first, first, "evaluate small: starts, 0 of 131,072 tokens"]
    # after its last step a stage is still at work
    assert log.wait(10) == ["evaluate small: at work, 10 s so far"]


def test_a_resumed_stage_reports_its_start_and_its_own_rate(log: Log) -> None:
    log.take(65536)
    assert log.written == [f"{STAGE}: starts at 65,536 of 131,072 tokens"]
    log.take(65536 + 10240)
    assert log.wait(10) == [f"{STAGE}: 75,776 of 131,072 tokens, 1,024 tokens/s, 54 s left"]


def test_a_stage_of_unknown_length_counts_and_reports_its_end(log: Log) -> None:
    log.take(0, "corpus", total=0, unit="documents")
    log.take(640, "corpus", total=0, unit="documents")
    assert log.wait(10) == ["corpus: 640 documents, 64 documents/s"]
    log.take(0)
    assert log.written[1:] == [
        "corpus: 640 documents in 10 s, 64 documents/s",
        f"{STAGE}: starts, 0 of 131,072 tokens",
    ]


def test_a_step_without_counts_is_reported_if_it_takes_long(log: Log) -> None:
    log.doing("load the teacher")
    assert log.written == []
    assert log.wait(2) == [f"{STAGE}: load the teacher"]
    assert log.wait(8) == [f"{STAGE}: load the teacher, 10 s so far"]
    log.take(0)
    assert log.written[1:] == [
        f"{STAGE}: load the teacher: took 10 s",
        f"{STAGE}: starts, 0 of 131,072 tokens",
    ]
    # a note comes after the end of its step
    log.doing("measure its speed", "speed")
    log.wait(11)
    log.lines.note("speed", "done")
    assert log.written[-2:] == ["speed: measure its speed: took 11 s", "done"]


def test_a_note_within_a_stage_does_not_restart_it(log: Log) -> None:
    for stage, total in ((STAGE, TOTAL), ("corpus", 0)):
        log.take(0, stage, total=total)
        log.take(256, stage, total=total)
        del log.written[:]
        log.lines.note(stage, "one row is bad")
        log.take(512, stage, total=total)
        assert log.written == ["one row is bad"]


def test_a_pause_within_a_stage_does_not_end_it(log: Log) -> None:
    log.take(0)
    log.take(1024)
    log.doing("save a checkpoint")
    assert log.wait(10) == [
        f"{STAGE}: save a checkpoint",
        f"{STAGE}: 1,024 of 131,072 tokens, 102 tokens/s, 21 min 10 s left, save a checkpoint for "
        "10 s",
    ]
    del log.written[:]
    log.take(2048)
    assert log.written == []


def test_every_pass_of_a_stage_is_named(log: Log) -> None:
    log.take(0, "choice", total=8, unit="sequences", part="pass 1 of 2, without layer 0")
    log.take(4, "choice", total=8, unit="sequences", part="pass 1 of 2, without layer 0")
    log.now += 2
    log.take(4, "choice", total=8, unit="sequences", part="pass 2 of 2, without layer 1")
    assert log.written == [
        "choice, pass 1 of 2, without layer 0: starts, 0 of 8 sequences",
        "choice, pass 2 of 2, without layer 1: 4 of 8 sequences, 2 sequences/s, 2 s left",
    ]


def test_a_command_without_reports_still_has_lines(log: Log) -> None:
    assert log.wait(9.5) == []
    assert log.wait(0.5) == ["plan: at work, 10 s so far"]


def test_a_thread_writes_between_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_lines, "INTERVALS", (0.01,))
    monkeypatch.setattr(progress_lines, "_BEAT", 0.01)
    written: list[str] = []
    lines = Lines(written.append, "plan", time.monotonic)
    lines.begin()
    deadline = time.monotonic() + 10
    while not written and time.monotonic() < deadline:
        time.sleep(0.01)
    lines.close()
    assert written[0] == "plan: at work, 0 s so far"
    count = len(written)
    time.sleep(0.05)
    assert len(written) == count


def test_a_closed_log_ends_the_lines_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_lines, "INTERVALS", (0.0,))
    monkeypatch.setattr(progress_lines, "_BEAT", 0.0)
    closed = io.StringIO()
    closed.close()
    lines = Lines(lambda line: print(line, file=closed), "plan", time.monotonic)
    lines.begin()
    assert lines._thread is not None
    lines._thread.join(10)
    assert not lines._thread.is_alive()
    lines.close()


def test_durations_have_two_units_and_rates_three_digits() -> None:
    durations = {
        0.4: "0 s", 45: "45 s", 59.7: "1 min", 116: "1 min 56 s", 3600: "1 h", 7500: "2 h 5 min",
        7520: "2 h 5 min", 273600: "3 d 4 h",
    }  # fmt: skip
    assert {seconds: duration(seconds) for seconds in durations} == durations
    rates = {0.1234: "0.123", 21.24: "21.2", 1024.4: "1,024"}
    assert {count: rate(count) for count in rates} == rates


PHASES = {
    "run": (
        "corpus", "teacher-logits heldout", "teacher-logits train", "train-student small",
        "train-student baseline", "evaluate teacher", "evaluate small",
    ),
    "sweep": ("train-student small-steps-2",),
    "export": ("export small hf",),
    "report": ("report continuations",),
    "verify": ("store verify",),
    "plan": ("pilot",),
}  # fmt: skip
"""Stages that count, by command."""
COMMANDS = {
    "sweep": ("sweep", "r.toml", "--grid", "students.small.train.steps=2"),
    "export": ("export", "r.toml", "small", "--to", "hf"),
    "report": ("report", "r.toml", "--prompts", "1"),
    "verify": ("store", "verify", "runs/r/logits"),
    "plan": ("plan", "r.toml", "--pilot", "4"),
}


def starts(output: str) -> Iterator[str]:
    """Stages whose start was reported; every line is whole and plain."""
    assert not re.search(r"[\r\x1b]", output)
    assert output.endswith("\n")
    for line in output.splitlines():
        if found := re.fullmatch(r"(.+): starts(, 0 of [\d,]+ \w+)?", line):
            yield found[1]


@pytest.mark.slow
def test_every_command_reports_the_start_of_its_stages(desk: Desk) -> None:
    assert set(PHASES["run"]) <= set(starts(desk.done("run", "r.toml").stderr))
    for name, command in COMMANDS.items():
        assert set(PHASES[name]) <= set(starts(desk.done(*command).stderr)), name
    again = desk.done("sweep", "r.toml", "--grid", "students.small.train.steps=1,3").stderr
    assert "sweep: point 1 of 2: small-steps-1\n" in again
