"""Writing so that a name on disk exists only when what it names is whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING, Any

from .errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRATCH_PREFIX = ".unfinished-"
"""Names that begin so are nobody's: what an interrupted write leaves, safe to delete."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a scratch path beside `path`; rename it into place only if the block succeeds.

    Ctrl-C and errors remove the scratch file. The data reaches the disk (fsync) before the name.

    Raises
        ColdstillError: the disk is full or the folder cannot be written
    """
    scratch = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(4)}-{path.name}")
    with told_where(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            _sync(scratch)
            scratch.replace(path)
            _sync(path.parent)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; one that already stands at `path` is replaced."""
    scratch = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(4)}-{path.name}")
    with told_where(path):
        try:
            scratch.mkdir(parents=True)
            yield scratch
            _readable(scratch)
            sync_tree(scratch)
            if path.exists():
                old = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(4)}-{path.name}")
                path.replace(old)
                try:
                    scratch.replace(path)
                except BaseException:
                    old.replace(path)
                    raise
                shutil.rmtree(old)
            else:
                scratch.replace(path)
            _sync(path.parent)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise


def _readable(folder: Path) -> None:
    """Give every file of a folder the mode of a new one: some libraries write into a private file
    and rename that, and what they leave nobody else can read."""
    probe = folder / f"{SCRATCH_PREFIX}mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)


def json_bytes(value: Any) -> bytes:
    """A JSON value as the content of a file; the same value always gives the same bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    with whole_file(path) as scratch:
        scratch.write_bytes(json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
        ColdstillError: it is not there or is not JSON
    """
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ColdstillError(f"{path}: not there") from error
    except OSError as error:
        raise ColdstillError(f"{path}: cannot be read as JSON: {error}") from error


def parse_json(content: bytes, where: str) -> Any:
    """The value of a JSON file's content; raises ColdstillError if it is none."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ColdstillError(f"{where}: cannot be read as JSON: {error}") from error


def remove_scratch(folder: Path) -> None:
    """Delete what interrupted writes left directly inside `folder`."""
    for leftover in folder.glob(f"{SCRATCH_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def told_where(path: Path) -> Iterator[None]:
    """Turn a full disk and a folder that cannot be written into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ColdstillError(
                f"{path}: the disk is full; finished results are kept, free some space and run the "
                "same command again"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR):
            raise ColdstillError(f"{path}: cannot be written: {error.strerror}") from error
        raise


def sync_tree(path: Path, *, contents: bool = True) -> None:
    """Bring a file, or a folder and what it holds, to the disk."""
    if contents and path.is_dir():
        for inner in sorted(path.rglob("*")):
            _sync(inner)
    _sync(path)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
