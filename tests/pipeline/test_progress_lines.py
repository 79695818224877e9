"""What a batch system's log gets: plain lines at the start of a stage and at growing intervals."""

from __future__ import annotations

import io
import re
import time
from typing import TYPE_CHECKING

import pytest
from coldstill.pipeline.cli import progress as progress_lines
from coldstill.pipeline.cli.progress import Lines
from coldstill.pipeline.units import duration, rate
from coldstill.stages.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from desk import Desk

pytest_plugins = ("desk",)

STAGE = "teacher-logits train"
TOTAL = 131072


class Log:
    """Lines on a clock of the test's own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.written: list[str] = []
        self.lines = Lines(self.written.append, "plan", lambda: self.now)

    def take(self, done: int, stage: str = STAGE, *, total: int = TOTAL, **more: object) -> None:
        """A report of a stage that counts."""
        self.lines.take(Report(stage=stage, done=done, total=total, **more))  # type: ignore[arg-type]

    def doing(self, what: str, stage: str = STAGE) -> None:
        """A report of what is not counted."""
        self.lines.take(Report(stage=stage, doing=what))

    def wait(self, seconds: float) -> list[str]:
        """What is written while nothing is reported."""
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


def test_a_stage_reports_its_start_and_then_its_progress(log: Log) -> None:
    log.take(0)
    assert log.written == [f"{STAGE}: starts, 0 of 131,072 tokens"]
    log.now += 12
    log.take(12288, step=12288)
    assert log.written[1:] == [
        f"{STAGE}: 12,288 of 131,072 tokens, 1,024 tokens/s, 1 min 56 s left"
    ]


def test_lines_come_after_10_and_another_30_seconds_and_then_every_minute(log: Log) -> None:
    log.take(0)
    began, told = log.now, []
    for done in range(1, 1200):
        log.now = began + done / 4
        before = len(log.written)
        log.take(done)
        told += [log.now - began] * (len(log.written) - before)
    assert told == [10, 40, 100, 160, 220, 280]


def test_lines_also_come_without_reports(log: Log) -> None:
    log.take(0)
    assert log.wait(9) == []
    assert log.wait(2) == [f"{STAGE}: 0 of 131,072 tokens, 10 s so far"]
    log.take(4096)
    assert log.wait(30) == [f"{STAGE}: 4,096 of 131,072 tokens, 102 tokens/s, 20 min 40 s left"]


def test_the_line_has_the_loss(log: Log) -> None:
    log.take(0, "train-student small")
    log.take(1024, "train-student small", figures={"loss": 3.25})
    (line,) = log.wait(10)
    assert line.endswith("left, loss 3.25")


def test_a_short_stage_has_one_line(log: Log) -> None:
    log.take(0)
    log.take(TOTAL)
    log.take(0, "evaluate small")
    assert log.written == [
        f"{STAGE}: starts, 0 of 131,072 tokens",
        "evaluate small: starts, 0 of 131,072 tokens",
    ]


def test_a_stage_with_progress_lines_reports_its_end(log: Log) -> None:
    log.take(0)
    log.wait(32)
    log.take(TOTAL)
    assert log.written[1:] == [f"{STAGE}: 131,072 of 131,072 tokens in 32 s, 4,096 tokens/s"]


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


def test_a_note_comes_after_the_end_of_its_step(log: Log) -> None:
    log.doing("measure its speed")
    log.wait(11)
    log.lines.say(STAGE, "done")
    assert log.written[-2:] == [f"{STAGE}: measure its speed: took 11 s", "done"]


def test_a_note_within_a_stage_does_not_restart_it(log: Log) -> None:
    for stage, total in ((STAGE, TOTAL), ("corpus", 0)):
        log.take(0, stage, total=total)
        log.take(256, stage, total=total)
        del log.written[:]
        log.lines.say(stage, "one row is bad")
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


def test_a_repeated_stage_reports_its_start_again(log: Log) -> None:
    log.take(0)
    log.take(TOTAL)
    log.take(0)
    assert log.written == [f"{STAGE}: starts, 0 of 131,072 tokens"] * 2


def test_a_command_without_reports_still_has_lines(log: Log) -> None:
    assert log.wait(9.5) == []
    assert log.wait(0.5) == ["plan: at work, 10 s so far"]


def test_after_its_last_step_a_stage_is_still_at_work(log: Log) -> None:
    log.take(0)
    log.take(TOTAL)
    assert log.wait(10) == [f"{STAGE}: at work, 10 s so far"]


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


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (45, "45 s"), (59.7, "1 min"), (116, "1 min 56 s"), (3600, "1 h"),
     (7500, "2 h 5 min"), (7520, "2 h 5 min"), (273600, "3 d 4 h")],
)  # fmt: skip
def test_durations_are_read_in_two_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(0.1234, "0.123"), (21.24, "21.2"), (1024.4, "1,024")])
def test_rates_are_read_in_three_digits(count: float, said: str) -> None:
    assert rate(count) == said


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


def starts(said: str) -> Iterator[str]:
    """Stages whose start was told; every line is whole and plain."""
    assert not re.search(r"[\r\x1b]", said)
    assert said.endswith("\n")
    for line in said.splitlines():
        if found := re.fullmatch(r"(.+): starts(, 0 of [\d,]+ \w+)?", line):
            yield found[1]


def test_every_command_reports_the_start_of_its_stages(desk: Desk) -> None:
    assert set(PHASES["run"]) <= set(starts(desk.done("run", "r.toml").stderr))
    for name, command in COMMANDS.items():
        assert set(PHASES[name]) <= set(starts(desk.done(*command).stderr)), name
    again = desk.done("sweep", "r.toml", "--grid", "students.small.train.steps=1,3").stderr
    assert "sweep: point 1 of 2: small-steps-1\n" in again
