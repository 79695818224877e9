"""One export put to the question: refused beyond the limits of its format."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError
from ..report import Report, Reporter
from .fidelity import check

if TYPE_CHECKING:
    from pathlib import Path

    from .contract import Format, Runtime
    from .fidelity import Checked
    from .ground import Ground


class DiffersError(ColdstillError):
    """An export says something else than its student."""


def checked(
    stage: str, form: Format, runtime: Runtime, ground: Ground, report: Reporter
) -> Checked:
    """What came of asking a loaded export.

    Raises
        DiffersError: it is beyond its limits (by what), or knows of other tokens
    """
    source, total = ground.source, len(ground.documents)

    def tell(done: int) -> None:
        report(Report(stage=stage, done=done, total=total, step=1, unit="documents"))

    report(Report(stage=stage, total=total, unit="documents"))
    try:
        found = check(ground.student, runtime, ground.documents, source.vocabulary, tell)
    except ColdstillError as error:
        raise DiffersError(f"{stage}: {runtime.title} {error}") from error
    excess = found.fidelity.excess(form.limits)
    if excess is not None:
        raise DiffersError(
            f"{stage}: {runtime.title} does not say what the student says, over "
            f"{found.fidelity.positions:,} held-out positions: {excess}"
        )
    return found


def checked_base(
    stage: str, name: str, form: Format, folder: Path, ground: Ground, report: Reporter
) -> dict[str, Any]:
    """The record of what another format is quantised from.

    stage  of that other one
    name   of this one

    Raises
        DiffersError: it is beyond its limits
    """
    runtime = form.open(ground.source, folder)
    try:
        found = checked(f"{stage}: before it is quantised ({name})", form, runtime, ground, report)
    finally:
        runtime.close()
    return {
        "format": name,
        "checked_by": runtime.title,
        "checked_by_own_runtime": runtime.is_own,
        "check": found.fidelity.to_json(),
        "limits": asdict(form.limits),
    }
