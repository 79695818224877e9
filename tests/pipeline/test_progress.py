"""What is drawn on a terminal: bars; and sentences anywhere."""

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
from typing import TYPE_CHECKING, Any

from coldstill.pipeline.cli.progress import Bars, Progress
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


def bar_of(progress: Progress) -> Any:
    """What is on the terminal now."""
    assert isinstance(progress._drawn, Bars)
    return progress._drawn.bar


def step(done: int, total: int = 4000, stage: str = "teacher-logits", **figures: float) -> Report:
    """A step of 1000 tokens."""
    return Report(stage=stage, done=done, total=total, step=1000, figures=figures)


def test_without_a_terminal_there_are_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for done in (0, 1000, 2000, 4000):
            progress(step(done))
        progress(Report(stage="corpus", note="three documents"))
        progress(Report(stage="corpus", note="beware", warning=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "teacher-logits: starts, 0 of 4,000 tokens\n"
        "corpus: three documents\n"
        "corpus: warning: beware\n"
    )


def test_only_the_first_of_several_processes_writes_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Progress() as progress:
        progress(step(1000))
        progress(Report(stage="corpus", doing="look the sources up"))
        progress(Report(stage="corpus", note="beware", warning=True))
    assert capsys.readouterr().err == "corpus: warning: beware\n"


def test_a_step_without_counts_is_shown_until_the_next_one() -> None:
    with watched() as (progress, terminal):
        progress(Report(stage="teacher-logits", doing="load the teacher"))
        assert terminal.getvalue().endswith("teacher-logits: load the teacher")
        progress(step(1000))
        progress(Report(stage="teacher-logits", doing="save a checkpoint"))
        progress(step(2000))
        assert bar_of(progress).n == 2000
    assert "load the teacher" not in terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert terminal.getvalue().count("\n") == 1  # of the bar that stays


def test_on_a_terminal_passes_share_a_bar_that_names_the_one_it_is_at() -> None:
    with watched() as (progress, terminal):
        progress(Report(stage="choice", part="pass 1 of 2", done=1, total=2, step=1))
        first = bar_of(progress)
        progress(Report(stage="choice", part="pass 2 of 2", done=2, total=2, step=1))
        assert bar_of(progress) is first
    assert "pass 2 of 2" in terminal.getvalue()


def test_a_note_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for stage in ("corpus", "other", "corpus"):
            progress(Report(stage=stage, note="three documents"))
    assert capsys.readouterr().err == "corpus: three documents\nother: three documents\n"


def test_on_a_terminal_a_bar_tells_rate_time_left_and_figures() -> None:
    with watched() as (progress, terminal):
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


def test_a_resumed_bar_starts_where_the_work_resumes() -> None:
    with watched() as (progress, _):
        progress(step(3000))
        assert (bar_of(progress).initial, bar_of(progress).n) == (2000, 3000)


def test_a_bar_of_unknown_length_counts() -> None:
    with watched() as (progress, terminal):
        progress(Report(stage="corpus", done=256, unit="documents"))
    assert re.search(r"corpus: 256 documents \[", terminal.getvalue())


def test_each_stage_has_its_own_bar_and_the_last_is_closed() -> None:
    with watched() as (progress, terminal):
        progress(step(4000, stage="a"))
        first = bar_of(progress)
        progress(step(1000, stage="b"))
        assert bar_of(progress) is not first
        second = bar_of(progress)
        assert first.disable  # what tqdm sets on closing
        assert not second.disable
    assert second.disable
    assert terminal.getvalue().endswith("\n")


def test_a_note_never_appears_inside_a_bar() -> None:
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
    while not re.search(rb"\nnext: .*\r\n$", drawn) and select.select([ours], [], [], 60)[0]:
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
    assert re.fullmatch(r"teacher-logits train: \d+ shards? in runs/r/logits", lines[-2])
