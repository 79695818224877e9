"""Objects below an address, through fsspec: whole reads and writes, repeated on network errors."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ColdstillError
from ..store.layout import CLAIMS, LOCK, unseal
from .faults import Patience, code, persistently, reason, without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_Result = TypeVar("_Result")

_PACKAGES = {
    "s3": "'coldstill[s3]'",
    "s3a": "'coldstill[s3]'",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
}
"""The package to install for a protocol; fsspec names the others."""
_RECORDS = (".json", LOCK)
_OWN_OPTIONS: dict[str, dict[str, Any]] = {
    # Two layers below repeat requests, too: together with ours that would be 150 times.
    "s3": {"config_kwargs": {"retries": {"total_max_attempts": 1}}},
}


class Objects:
    """The objects below an address. Each write is whole: a put is atomic in object stores."""

    def __init__(self, url: str, patience: Patience, options: dict[str, Any] | None = None) -> None:
        """Name the address; nothing is read or written.

        options  for fsspec, besides those that it reads from the environment
        """
        self._url = url if url.endswith("://") else url.rstrip("/")
        self._patience = patience
        self._options = options or {}
        self._connected: tuple[int, Any, str] | None = None

    def __str__(self) -> str:
        return without_secrets(self._url)

    def path(self, name: str) -> str:
        return str(self) if name == "." else f"{self}/{name}"

    def kind(self, name: str) -> str | None:
        try:
            found = self._call(name, lambda system, path: system.info(path))
        except FileNotFoundError:
            return None
        return "directory" if found["type"] == "directory" else "file"

    def names(self, folder: str) -> set[str]:
        try:
            found, path = self._call(folder, lambda s, path: (s.ls(path, detail=False), path))
        except (FileNotFoundError, NotADirectoryError):
            return set()
        inside = f"{path.strip('/')}/"  # an object may have the folder's name
        paths = [each.strip("/") for each in found]
        return {p.removeprefix(inside) for p in paths if p.startswith(inside) and p != inside}

    def sizes(self, folder: str) -> dict[str, int]:
        """The size in bytes of every object below a folder, by its name in the folder."""
        try:
            found, path = self._call(folder, lambda s, path: (s.find(path, detail=True), path))
        except FileNotFoundError:
            return {}
        inside = f"{path.strip('/')}/"
        paths = {each.strip("/"): info["size"] for each, info in found.items()}
        return {p.removeprefix(inside): size for p, size in paths.items() if p.startswith(inside)}

    def read(self, name: str) -> bytes:
        """The content of a small object.

        A record that looks damaged is read again, as the network may have damaged it. Two equal
        answers are taken as the content.

        Raises
            FileNotFoundError: the object does not exist
        """
        content: bytes = self._call(name, lambda system, path: system.cat_file(path))
        for _ in range(self._patience.tries - 1):
            is_record = name.endswith(_RECORDS) or name.startswith(f"{CLAIMS}/")
            if not is_record or is_whole(content):
                break
            before, content = content, self._call(name, lambda system, path: system.cat_file(path))
            if before == content:
                break
        return content

    def write(self, name: str, content: bytes, before: Callable[[], None] | None = None) -> None:
        """Write a small object, replacing an existing one; `before` is called at each attempt."""
        self._call(name, lambda system, path: _pipe(system, path, content), before)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless it exists; whether it was written.

        A service without conditional requests writes it in any case.
        """

        def call(system: Any, path: str) -> bool:
            try:
                _pipe(system, path, content, mode="create")
            except FileExistsError:
                return False
            except (TypeError, ValueError, NotImplementedError, OSError) as error:
                if code(error) == "PreconditionFailed":
                    return False
                if isinstance(error, OSError) and code(error) not in ("NotImplemented", "501"):
                    raise
                if _is_there(system, path):
                    return False
                _pipe(system, path, content)
            return True

        return self._call(name, call)

    def upload(self, files: dict[str, Path], before: Callable[[], None] | None = None) -> None:
        """Upload local files under the given names; `before` is called at each attempt."""

        def call(system: Any, root: str) -> None:
            paths = [f"{root}/{name}" for name in files]
            for folder in {path.rpartition("/")[0] for path in paths}:
                _make(system, folder)
            system.put([str(made) for made in files.values()], paths)

        self._call(".", call, before)

    def download(self, files: dict[str, Path]) -> None:
        """Download objects, by their names, to local files. Raises FileNotFoundError if an object
        does not exist."""

        def call(system: Any, root: str) -> None:
            # Each attempt writes other files: a failed one may still be writing.
            token = secrets.token_hex(4)
            parts = [target.with_name(f"{target.name}.{token}") for target in files.values()]
            try:
                system.get([f"{root}/{name}" for name in files], [str(part) for part in parts])
                for part, target in zip(parts, files.values(), strict=True):
                    part.replace(target)
            except BaseException:
                for part in parts:
                    part.unlink(missing_ok=True)
                raise

        self._call(".", call)

    def remove(self, name: str, before: Callable[[], None] | None = None) -> None:
        """Delete an object, or all objects below a folder; no error if none exists."""
        try:
            self._call(name, lambda system, path: system.rm(path, recursive=True), before)
        except FileNotFoundError:
            return

    def _call(
        self,
        name: str,
        call: Callable[[Any, str], _Result],
        before: Callable[[], None] | None = None,
    ) -> _Result:
        def attempt() -> _Result:
            if before is not None:
                before()
            system, root = self._system()
            system.invalidate_cache()  # its listings may be old: other processes write, too
            return call(system, root if name == "." else f"{root}/{name}")

        return persistently(attempt, self.path(name), self._patience)

    def _system(self) -> tuple[Any, str]:
        """The file system of this process; its connections and its thread do not survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            system, root = self._connect()
            self._connected = os.getpid(), system, root
        return self._connected[1:]

    def _connect(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        protocol = self._url.partition("://")[0].partition("::")[0]
        if not self._url.partition("://")[2].strip("/"):
            raise ColdstillError(f"{self}: names no bucket or folder; give {protocol}://NAME/...")
        options = {**_OWN_OPTIONS.get(protocol.removesuffix("a"), {}), **self._options}
        try:
            system, root = url_to_fs(self._url, use_listings_cache=False, **options)
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            what = f"pip install {package}" if package else reason(error)
            raise ColdstillError(
                f"{self}: {protocol}:// needs a package that is not installed; {what}"
            ) from error
        except ValueError as error:
            raise ColdstillError(f"{self}: no such address: {reason(error)}") from error
        if protocol in ("s3", "s3a"):
            system.retries = 1  # repeated by `persistently` instead
        return system, root.rstrip("/")


def is_whole(content: bytes) -> bool:
    """Whether this is a sealed record without damage."""
    try:
        unseal(content, "")
    except ColdstillError:
        return False
    return True


def _pipe(system: Any, path: str, content: bytes, **mode: str) -> None:
    _make(system, path.rpartition("/")[0])
    system.pipe_file(path, content, **mode)


def _is_there(system: Any, path: str) -> bool:
    try:
        system.info(path)
    except FileNotFoundError:
        return False
    return True


def _make(system: Any, folder: str) -> None:
    # Where folders are only prefixes, creating one may create a bucket.
    protocols = [system.protocol] if isinstance(system.protocol, str) else system.protocol
    if not _PACKAGES.keys() & set(protocols):
        with contextlib.suppress(NotImplementedError):
            system.makedirs(folder, exist_ok=True)
