"""The command line: every command parses its arguments and calls one function."""

from __future__ import annotations

from .commands import main

__all__ = ["main"]
