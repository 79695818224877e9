"""What is drawn: bars where somebody watches, sentences anywhere."""

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
from typing import TYPE_CHECKING

from coldstill.pipeline.progress import Progress
from coldstill.stages.report import Report

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest
    from desk import Desk, Processes

pytest_plugins = ("desk",)


class Terminal(io.StringIO):
    """A stream that somebody watches."""

    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def watched() -> Iterator[tuple[Progress, Terminal]]:
    """A reporter that draws on a terminal."""
    with contextlib.redirect_stderr(Terminal()) as terminal, Progress() as progress:
        yield progress, terminal


def step(done: int, total: int = 4000, stage: str = "teacher-logits", **figures: float) -> Report:
    """A step of 1000 tokens."""
    return Report(stage=stage, done=done, total=total, step=1000, figures=figures)


def test_without_a_terminal_there_are_only_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for done in (1000, 2000, 4000):
            progress(step(done))
        progress(Report(stage="corpus", note="three documents"))
        progress(Report(stage="corpus", note="beware", warning=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "corpus: three documents\ncorpus: warning: beware\n"


def test_a_sentence_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for stage in ("corpus", "other", "corpus"):
            progress(Report(stage=stage, note="three documents"))
    assert capsys.readouterr().err == "corpus: three documents\nother: three documents\n"


def test_on_a_terminal_a_bar_tells_rate_time_left_and_figures() -> None:
    with watched() as (progress, terminal):
        progress(step(1000))
        progress._bar.start_t -= 5  # as if it had taken a while
        progress._bar.last_print_t -= 5
        progress(step(2000, loss=3.25))
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("teacher-logits:  50%")
    assert "2.00k/4.00k" in last
    assert re.search(r"\[00:05<\d\d:\d\d, ", last)
    assert "tokens/s" in last
    assert "loss=3.25" in last


def test_a_resumed_bar_starts_where_the_work_goes_on() -> None:
    with watched() as (progress, _):
        progress(step(3000))
        assert (progress._bar.initial, progress._bar.n) == (2000, 3000)


def test_a_bar_of_unknown_length_counts() -> None:
    with watched() as (progress, terminal):
        progress(Report(stage="corpus", done=256, unit="documents"))
    assert re.search(r"corpus: 256 documents \[", terminal.getvalue())


def test_each_stage_has_its_own_bar_and_the_last_is_closed() -> None:
    with watched() as (progress, terminal):
        progress(step(4000, stage="a"))
        first = progress._bar
        progress(step(1000, stage="b"))
        assert progress._bar is not first
        second = progress._bar
        assert first.disable  # what tqdm sets on closing
        assert not second.disable
    assert second.disable
    assert terminal.getvalue().endswith("\n")


def test_a_sentence_never_stands_inside_a_bar() -> None:
    with watched() as (progress, terminal):
        progress(step(1000))
        progress(Report(stage="teacher-logits", note="look"))
        progress(step(2000))
    assert "\nteacher-logits: look\n" in terminal.getvalue()


def test_the_bar_is_closed_when_the_work_fails() -> None:
    def fail(progress: Progress) -> None:
        progress(step(1000))
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), watched() as (progress, terminal):
        fail(progress)
    assert terminal.getvalue().endswith("\n")


def on_a_terminal(processes: Processes, desk: Desk, *arguments: str) -> tuple[str, int]:
    """What a command draws on a real terminal, and its exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    processes.begin(desk, os.ttyname(theirs), *arguments)
    drawn = b""
    while not drawn.endswith(b"runs/r/logits\r\n") and select.select([ours], [], [], 60)[0]:
        drawn += os.read(ours, 65536)
    os.close(theirs)
    os.close(ours)
    return drawn.decode(), processes.end()


def test_a_real_terminal_gets_bars_and_whole_lines(desk: Desk, processes: Processes) -> None:
    drawn, code = on_a_terminal(
        processes, desk, "teacher-logits", "r.toml", "--set", "logits.sequences=8"
    )
    assert code == 0, drawn
    for stage in ("corpus", "teacher-logits heldout", "teacher-logits train"):
        assert re.search(rf"\r{stage}: .*\d+%|\r{stage}: [\d.]+ documents", drawn), stage
    assert "tokens/s" in drawn
    assert drawn.endswith("\r\n")
    lines = drawn.replace("\r\n", "\n").splitlines()
    assert re.fullmatch(r"teacher-logits train: \d+ shards? in runs/r/logits", lines[-1])
