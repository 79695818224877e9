"""Datasets that the `datasets` package loads. No other module uses that package.

`hub:ORG/NAME?name=CONFIG&split=SPLIT&revision=REVISION` names a dataset. Instead of `ORG/NAME` a
local folder may be given that `load_dataset` reads: `/...`, `./...`, `../...` or `~/...`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPTIONS = ("name", "revision", "split")


def check_hub_entry(entry: str, base: Path) -> None:
    """Check an entry before anything is downloaded. Raises ColdstillError if the entry is invalid,
    its folder does not exist, or `datasets` is not installed."""
    _parse(entry)
    folder = local_folder(entry, base)
    if folder is not None and not folder.is_dir():
        raise ColdstillError(f"{entry}: no such folder: {folder}; check corpus.files")
    if importlib.util.find_spec("datasets") is None:
        raise ColdstillError(
            f"{entry}: needs the package 'datasets', which is not installed; "
            "pip install 'coldstill[hub]'"
        )


def local_folder(entry: str, base: Path) -> Path | None:
    """The local folder of an entry; None for a name on the hub."""
    name, _ = _parse(entry)
    is_path = name.startswith(("/", "./", "../", "~")) or Path(name).is_absolute()
    return base / Path(name).expanduser() if is_path else None


def load_hub(entry: str, folder: Path | None, *, streaming: bool = False) -> Any:
    """The split that an entry names, as a `datasets.Dataset`; with `streaming` as an
    `IterableDataset`, which downloads what is read. Raises ColdstillError if it cannot be loaded,
    or there are several splits and the entry names none."""
    import datasets

    name, options = _parse(entry)
    try:
        with _quiet_without_a_terminal(datasets):
            loaded = datasets.load_dataset(str(folder or name), streaming=streaming, **options)
    # Any exception is possible: of the network, the hub, a damaged file, a wrong split.
    except Exception as error:
        raise ColdstillError(
            f"{entry}: cannot be loaded: {first_line(error)}; check its name, its split and your "
            "access to it"
        ) from error
    if not isinstance(loaded, dict):
        return loaded
    if len(loaded) > 1:
        first = "train" if "train" in loaded else next(iter(loaded))
        raise ColdstillError(
            f"{entry}: has several splits ({', '.join(loaded)}); name the one to read: "
            f"{entry}{'&' if '?' in entry else '?'}split={first}"
        )
    return next(iter(loaded.values()))


def read_rows(entry: str, dataset: Any, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a `datasets.Dataset`, with the given columns. Raises ColdstillError if a row
    cannot be decoded."""
    rows = iter(dataset.select_columns(columns))
    for number in range(1, len(dataset) + 1):
        try:
            row = next(rows)
        except Exception as error:  # each type has a decoder with its own exceptions
            raise ColdstillError(
                f"{entry}: record {number}: datasets cannot read it: {first_line(error)}; load and "
                "save the data set again"
            ) from error
        yield row


def _parse(entry: str) -> tuple[str, dict[str, str]]:
    name, _, query = entry.removeprefix("hub:").partition("?")
    options: dict[str, str] = {}
    # Not a URL's query: `split=train+test` and `split=train[:10%]` are not escaped.
    for option in query.split("&") if query else ():
        key, _, value = option.partition("=")
        if key not in _OPTIONS or not value:
            raise ColdstillError(
                f"{entry}: cannot read {option!r}, expected one of "
                f"{', '.join(f'{known}=...' for known in _OPTIONS)}"
            )
        options[key] = value
    if not name:
        raise ColdstillError(f"{entry}: no name; write hub:ORG/NAME or hub:./folder")
    return name, options


@contextlib.contextmanager
def _quiet_without_a_terminal(datasets: Any) -> Iterator[None]:
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
