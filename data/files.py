"""Writes files and folders that exist only when they are complete; JSON; hashes of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING, Any

from .errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

SCRATCH_PREFIX = ".unfinished-"
"""Begins the names of unfinished files and folders, which are safe to delete."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`, and rename it to `path` if the block succeeds.

    Ctrl-C and errors delete the scratch file. The data reaches the disk (fsync) before the name.

    Raises
        ColdstillError: the disk is full or the folder cannot be written
    """
    scratch = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(4)}-{path.name}")
    with write_errors(path):
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
    """Yield a scratch folder, and rename it to `path` if the block succeeds.

    An existing folder at `path` is replaced. Errors are those of `whole_file`.
    """
    scratch = path.with_name(f"{SCRATCH_PREFIX}{secrets.token_hex(4)}-{path.name}")
    with write_errors(path):
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
    """Give every file in a folder at least the mode of a new file.

    Some libraries write a private file and rename it, so that other users cannot read it.
    """
    probe = folder / f"{SCRATCH_PREFIX}mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)


def json_bytes(value: Any) -> bytes:
    """A JSON value as the content of a file; equal values give equal bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    with whole_file(path) as scratch:
        scratch.write_bytes(json_bytes(value))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ColdstillError if the file does not exist or is not JSON."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise ColdstillError(f"{path}: does not exist") from error
    except OSError as error:
        raise ColdstillError(f"{path}: cannot be read as JSON: {error}") from error


def parse_json(content: bytes, where: str) -> Any:
    """Parse the content of a JSON file; raises ColdstillError if it is not JSON."""
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ColdstillError(f"{where}: cannot be read as JSON: {error}") from error


def remove_scratch(folder: Path) -> None:
    """Delete unfinished files and folders directly inside `folder`."""
    for leftover in folder.glob(f"{SCRATCH_PREFIX}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise ColdstillError, in one line, if the disk is full or `path` cannot be written."""
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
    """Write a file, or a folder and its files, to the disk (fsync)."""
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(paths: Iterable[Path]) -> str:
    """SHA-256 over names and contents of several files, independent of their folders."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tokens_sha256(table: Mapping[str, int]) -> str:
    """SHA-256 of a tokenizer's table of ids and tokens.

    Tokenizers with equal tables give equal ids, however the models' vocabularies are padded.
    """
    return json_sha256(sorted((index, token) for token, index in table.items()))


def first_difference(old: Any, new: Any, key: str = "") -> str | None:
    """The first leaf in which two JSON values differ, as `key = old, now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            # A missing key of `trainer` is not off: it has the default of transformers.
            if name not in old and not new[name] and not key.endswith("trainer"):
                continue  # a key that is newer than the record, and off now
            inner = f"{key}.{name}" if key else name
            if found := first_difference(old.get(name), new.get(name), inner):
                return found
        return None
    if _are_tables(old) and _are_tables(new):
        # A single table stands for a list with one table.
        olds, news = ([each] if isinstance(each, dict) else each for each in (old, new))
        for place, (one, other) in enumerate(itertools.zip_longest(olds, news)):
            if found := first_difference(one, other, f"{key}.{place}"):
                return found
        return None
    return None if old == new else f"{key or 'settings'} = {_short(old)}, now {_short(new)}"


def _are_tables(value: Any) -> bool:
    """Whether the value is a table, or a list of tables."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, dict) for each in value)
    return isinstance(value, dict)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = {name: inner for name, inner in value.items() if inner is not None}
    text = repr(value)
    return text if len(text) <= 40 else text[:13] + "..."
