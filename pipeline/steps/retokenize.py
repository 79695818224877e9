"""Makes the stores of students that have other tokens than the teacher, once for all of them.

They are folders of the run, `tokens/KEY/logits` and `tokens/KEY/heldout`, on this machine even if
the run's own stores are elsewhere. The key depends on the tokens and on what the recipe decides.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ...data.files import json_sha256, read_json, write_json
from ...data.places.claims import claimed
from ...data.store.layout import TOKENIZER
from ...data.store.reader import open_store
from ...stages.report import Report
from ..recipe.own_tokens import OwnTokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from ...data.maintenance import Notify
    from ...data.store.manifest import Manifest
    from ...data.store.reader import StoreReader
    from ...stages.report import Reporter
    from ...stages.student_chat import GivenTemplate
    from ..recipe.work import Work

_STAGE = "retokenize"


def retokenized(
    path: str,
    to: str,
    tokenizer: str,
    wanted: Mapping[str, Any],
    where: str,
    notify: Notify,
    report: Reporter,
) -> Manifest:
    """Write a store in the tokens of a tokenizer by name.

    wanted  the options `ambiguous`, `unaligned`, `special` and `branches`
    where   name of the tokenizer's option in messages

    Raises
        ColdstillError: as `data.maintenance.retokenize.retokenize`; the tokenizer cannot be loaded
    """
    from ...data.maintenance.retokenize import Decisions
    from ...stages.student_tokens import retokenize_for, special_texts, tokenizer_of

    decisions = Decisions(
        ambiguous=wanted["ambiguous"],
        unaligned=wanted["unaligned"],
        special=special_texts(tuple(wanted["special"]), "--special"),
        branches=wanted["branches"],
    )
    open_store(path)  # before a tokenizer is looked for on a hub
    loaded = tokenizer_of(tokenizer, where)
    named = f"the tokenizer of {tokenizer}"
    tell = _telling(report, f"store {_STAGE}")
    return retokenize_for(path, to, loaded, decisions, named, notify, tell)


def _telling(report: Reporter, stage: str) -> Callable[[GivenTemplate], None]:
    """Reports what becomes of a student's chat template."""
    return lambda given: report(Report(stage=stage, note=given.note, warning=given.warning))


def folder_in_tokens(store: StoreReader, named: str) -> str:
    """Name of the folder of a store in a student's tokens.

    named  name of a further teacher's store in the recipe; empty for the run's own
    """
    return f"other-{json_sha256(store.manifest.to_json())[:12]}" if named else "logits"


def store_in_tokens(
    work: Work, own: OwnTokens, store: StoreReader, name: str, tokenizer: Any, named: str
) -> StoreReader:
    """A store in the tokens of a student: made now, or by an earlier student with these tokens.

    name       of its folder, such as `logits`
    tokenizer  a loaded tokenizer
    named      the student's key in messages

    Raises
        ColdstillError: as `retokenize`, or the folder holds a store that was made from another one
    """
    from ...stages.student_tokens import retokenize_for

    folder = work.run.tokens / own.key
    record, place = folder / f"{name}.json", folder / name
    decisions = own.made(name, store.manifest.capture.tail)
    made_from = {"store": json_sha256(store.manifest.to_json()), **own.settings}
    instead = decisions.ambiguous != own.decisions["ambiguous"]
    if instead:
        made_from["ambiguous"] = decisions.ambiguous
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _nothing_left(folder),
        claimed(folder / f".{name}.claim", wait=True),
    ):  # one process makes it
        if record.exists() and read_json(record) != made_from:
            raise ColdstillError(
                f"{place}: made from another store, or otherwise; delete {folder} to make it again"
            )
        if not record.exists() or not _is_whole(place):
            work.note(
                f"{_STAGE} {name}",
                f"{named} has other tokens than the teacher; the store is written in its tokens "
                f"to {place}",
            )
            if instead:
                note = f"samples have no bucket, so ambiguous = {decisions.ambiguous} here"
                work.note(f"{_STAGE} {name}", note)

            def notify(what: str, done: int, total: int) -> None:
                stage = f"{_STAGE} {name}" + ("" if what == "write" else f": {what}")
                work.report(Report(stage=stage, done=done, total=total, unit="sequences"))

            write_json(record, made_from)
            tell = _telling(work.report, f"{_STAGE} {name}")
            try:
                retokenize_for(
                    str(store.place), str(place), tokenizer, decisions, f"the tokenizer of {named}",
                    notify, tell if name == "logits" else lambda given: None,
                )  # fmt: skip
            except ColdstillError:
                if not place.exists():
                    record.unlink()
                raise
    return open_store(place)


@contextlib.contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """Delete a folder that an error leaves empty, and the folder of such folders."""
    try:
        yield
    except ColdstillError:
        with contextlib.suppress(OSError):  # they are not empty
            folder.rmdir()
            folder.parent.rmdir()
        raise


def _is_whole(place: Path) -> bool:
    try:
        open_store(place)
    except ColdstillError:
        return False
    return True


def trained_store(work: Work, name: str, store: StoreReader, which: str) -> StoreReader:
    """The held-out store, or the store, in the tokens of a trained student: `store` itself if it
    has the teacher's tokens.

    which  `heldout` or `logits`

    Raises
        ColdstillError: the store that the student was trained from is not there any more
    """
    own = OwnTokens.recorded(work.run.student(name))
    if own is None:
        return store
    from ...stages.models.loading import load_tokenizer

    folder = work.run.tokens / own.key / "logits" / TOKENIZER
    if not folder.is_dir():
        raise ColdstillError(
            f"{folder}: missing; the student {name!r} has other tokens than the teacher and was "
            f"trained from a store with them; run coldstill train-student {work.named} --student "
            f"{name} to make it again"
        )
    tokenizer = load_tokenizer(str(folder), f"students.{name}")
    return store_in_tokens(work, own, store, which, tokenizer, f"students.{name}")
