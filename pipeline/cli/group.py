"""The top level of the command line: grouped help, and one line for every error."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from ...data.errors import ColdstillError, StoppedError, first_line
from ...stages.ranks import rank, world_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TRACEBACK = "COLDSTILL_TRACEBACK"
"""Environment variable; if it is set, errors show their whole traceback."""

SECTIONS: Mapping[str, Sequence[str]] = {
    "Prepare": ("init", "plan", "recipe-help"),
    "Stage one: the teacher": ("train-teacher", "teacher-logits", "import"),
    "Stage two: the students": ("prune-student", "train-student", "evaluate", "sweep"),
    "Both stages": ("run", "rounds"),
    "Run them on a cluster": ("launch",),
    "Look at results": ("compare", "report", "inspect"),
    "Use results elsewhere": ("export", "store"),
}
"""The list of commands, in the order in which they are used."""


class CommandList(click.Group):
    """Lists its commands with short help texts that are not cut."""

    @property
    def sections(self) -> Mapping[str, Sequence[str]]:
        """Names of the commands by title, in the order of the list."""
        return {"Commands": sorted(self.commands)}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(width), self.commands[name].get_short_help_str(limit=1000))
                        for name in names
                    ]
                )


class Group(CommandList):
    """The top level: lists commands by section, and turns errors into one line and a status."""

    sections = SECTIONS

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; our errors end it with status 1, Ctrl-C with 130, SIGTERM with 143."""
        try:
            return super().invoke(ctx)
        except ColdstillError as error:
            if os.environ.get(TRACEBACK):
                raise
            _fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has closed it
                raise
            _fail(_system_error(error))
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except StoppedError:
            if rank() == 0:
                started = "" if world_size() == 1 else "torchrun as before, "
                command = shlex.join(["coldstill", *sys.argv[1:]])
                click.echo(f"stopped as asked; resume with {started}{command}", err=True)
            # the work is not done, so a chain of commands must not go on
            sys.exit(128 + signal.SIGTERM)
        except KeyboardInterrupt:
            # caught before click sees it, since click would print another empty line
            start = "\n" if sys.stderr.isatty() else ""  # after the terminal's ^C
            click.echo(f"{start}interrupted; run the same command again to continue", err=True)
            sys.exit(130)
        except Exception as error:  # a bug of ours, or an unexpected error of a library
            if os.environ.get(TRACEBACK):
                raise
            _fail(_out_of_memory(error) or _bug(error))

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; usage errors end it with status 2."""
        try:
            return super().main(*args, **{**options, "standalone_mode": False})
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(130)


def _out_of_memory(error: Exception) -> str | None:
    """Return the message for too little memory; on a CPU torch raises a plain RuntimeError."""
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "t allocate memory" in text:
        return (
            f"not enough memory ({first_line(error)}); lower train.micro_batch_tokens or "
            "logits.batch_tokens, or corpus.sequence_length"
        )
    return None


def _bug(error: Exception) -> str:
    context = click.get_current_context(silent=True)
    words = [] if context is None else [word for word in (context.invoked_subcommand,) if word]
    return (
        f"unexpected {type(error).__name__} in {' '.join(['coldstill', *words])}: "
        f"{first_line(error)}; this is a bug in coldstill, not a mistake of yours; run it again "
        f"with {TRACEBACK}=1 for the traceback, and report that"
    )


def _fail(message: str) -> None:
    click.echo(f"error: {' '.join(message.splitlines())}", err=True)
    sys.exit(1)


def _system_error(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{error.filename or 'disk'}: the disk is full; finished results are kept, free some "
            "space and run the same command again"
        )
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason
