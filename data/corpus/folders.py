"""Chooses the files of a folder that are documents, not descriptions of a data set."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ColdstillError
from ..files import read_json
from .document import listed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SAVED_MARKERS = ("dataset_dict.json", "state.json", "dataset_info.json")
"""The files that `save_to_disk` of `datasets` writes beside the rows."""
_DESCRIPTIONS = (*SAVED_MARKERS, "dataset_infos.json", "croissant.json")
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|changes|contributing|code_of_conduct|citation"
    r"|security|authors|requirements)\b",
    re.IGNORECASE,
)
"""The beginnings of names of texts about a project."""
_CARD = re.compile(
    rb"(?:\xef\xbb\xbf)?---\r?\n(?:.*\n)*?(?:license|task_categories|dataset_info|configs"
    rb"|size_categories|pretty_name|annotations_creators|language|viewer|tags):"
)
"""The beginning of a data set's card on a hub."""
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in names of files and folders that name a split, as in `datasets`."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that may be a document, or records."""

    name: str
    """The folder as the user wrote it, and the path below it."""
    path: Path
    format: str | None
    """The format by its name; None for a file that is never read."""
    inside: str = ""
    """The path below the folder or glob."""


def choose_documents(candidates: Sequence[Candidate], left_out: list[str]) -> list[Candidate]:
    """The files of a folder or a glob that are documents; names of others are added to `left_out`.

    Descriptions of a data set are not documents (`dataset_infos.json`, its card). In a folder that
    holds records, at any depth, texts about them are not documents (`README.md`, `LICENSE.txt`). In
    the described folder of a data set, no text beside records is a document.
    """
    readable = [c for c in candidates if c.format and c.path.name not in _DESCRIPTIONS]
    described = {
        c.path.parent for c in candidates if c.path.name in _DESCRIPTIONS or _is_card(c.path)
    }
    with_records = {
        folder for c in readable if c.format not in ("text", "python") for folder in c.path.parents
    }
    chosen = []
    for candidate in readable:
        above = described.intersection(candidate.path.parents)
        about = _ABOUT.match(candidate.path.name) and (
            above or candidate.path.parent in with_records
        )
        if candidate.format != "text" or not (about or above & with_records):
            chosen.append(candidate)
    kept = {candidate.path for candidate in chosen}
    left_out += [c.name for c in candidates if c.path not in kept]
    return chosen


def note_left_out(names: Sequence[str]) -> str | None:
    """A sentence that names files that were not read as documents; None if there are none."""
    if not names:
        return None
    several = "file is not a document" if len(names) == 1 else "files are not documents"
    some = names[:3]
    more = f" and {len(names) - len(some):,} more" if len(names) > len(some) else ""
    return f"{len(names):,} {several} and not read: {listed(some)}{more}"


def expect_one_split(entry: str, chosen: Sequence[Candidate]) -> None:
    """Refuse a folder with training and test rows: students would be trained on test rows. Raises
    ColdstillError if the names of the files name several splits."""
    found: dict[str, str] = {}
    for candidate in chosen:
        split, stem = _split(candidate)
        if split is not None and candidate.format != "text":
            found.setdefault(split, stem)
    if len(found) > 1:
        first = found.get("train") or next(iter(found.values()))
        raise ColdstillError(
            f"{entry}: a data set of several splits ({', '.join(found)}); name the files of the "
            f"one to read, such as {first}"
        )


def walk(name: str, folder: Path, format_of: Callable[[str], str | None]) -> Iterator[Candidate]:
    """All files below a folder, sorted, without hidden names. Links to a folder above are ignored.

    A data set saved by `save_to_disk` gives only its Arrow files.
    """
    name = name.rstrip("/")
    for candidate in _walk(name, folder, format_of, set()):
        inside = candidate.name.removeprefix(f"{name}/")
        yield Candidate(candidate.name, candidate.path, candidate.format, inside)


def _walk(
    name: str, folder: Path, format_of: Callable[[str], str | None], seen: set[Path]
) -> Iterator[Candidate]:
    if folder.resolve() in seen:  # a link to a folder above
        return
    seen.add(folder.resolve())
    saved = _saved_dataset(name, folder)
    if saved is not None:
        yield from saved
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(f"{name}/{path.name}", path, format_of, seen)
        elif path.is_file():
            yield Candidate(f"{name}/{path.name}", path, format_of(path.name))


def _saved_dataset(name: str, folder: Path) -> list[Candidate] | None:
    """The Arrow files of a data set saved by `save_to_disk`; None for other folders."""
    splits_marker, state_marker, info_marker = (folder / marker for marker in SAVED_MARKERS)
    try:
        if splits_marker.is_file():
            splits = list(read_json(splits_marker)["splits"])
            if len(splits) > 1:
                first = "train" if "train" in splits else splits[0]
                raise ColdstillError(
                    f"{name}: a saved dataset of several splits ({', '.join(splits)}); name the "
                    f"one to read: {name}/{first}"
                )
            return _saved_dataset(f"{name}/{splits[0]}", folder / splits[0])
        if not (state_marker.is_file() and info_marker.is_file()):
            return None
        state = read_json(state_marker)
        names = [str(file["filename"]) for file in state["_data_files"]]
        reordered = bool(state.get("_indices_data_files"))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ColdstillError(
            f"{name}: its {splits_marker.name} or {state_marker.name} is not what save_to_disk "
            "writes; save the dataset again"
        ) from error
    if reordered or not names:
        fault = "keeps its row order apart from its rows" if reordered else "has no rows"
        raise ColdstillError(f"{name}: the saved dataset {fault}; save it again")
    if missing := [file for file in names if not (folder / file).is_file()]:
        raise ColdstillError(f"{name}: {missing[0]} is missing; save or copy the dataset again")
    return [Candidate(f"{name}/{file}", folder / file, "arrow") for file in names]


def _is_card(path: Path) -> bool:
    if path.name.lower() != "readme.md":
        return False
    return _CARD.match(_begin(path)) is not None or _is_clone(path.parent)


def _is_clone(folder: Path) -> bool:
    """Whether a folder was downloaded from a hub, by files that download tools leave."""
    downloaded = (folder / ".cache" / "huggingface", folder / ".huggingface")
    return any(map(Path.is_dir, downloaded)) or b"filter=lfs" in _begin(folder / ".gitattributes")


def _begin(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""


def _split(candidate: Candidate) -> tuple[str | None, str]:
    """The split in a file's path, or None, and a pattern for the files of that split."""
    inside = Path(candidate.inside)
    above = candidate.name.removesuffix(candidate.inside)
    for place, part in reversed(list(enumerate(inside.parts))):
        is_file = place == len(inside.parts) - 1
        words = list(re.finditer(r"[a-z]+", part.lower()))
        for word in words:
            if split := _SPLITS.get(word[0]):
                upper = above + "".join(f"{folder}/" for folder in inside.parts[:place])
                return split, f"{upper}{part[: word.end()]}*" if is_file else f"{upper}{part}"
    return None, ""
