"""Checkpoints of a training run: which of them are whole, and where training stood in them."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from ...data.errors import ColdstillError
from ...data.files import read_json, write_json
from ...data.settings import first_difference
from .feed import OrderPosition

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

_WHOLE = "whole.json"
"""Written into a checkpoint after everything else: without it, the checkpoint was cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """Where training stood at a checkpoint, besides what the trainer knows of it."""

    step: int = 0
    place: OrderPosition = field(default_factory=OrderPosition)
    """In the order of the sequences."""
    measured: dict[str, float] = field(default_factory=dict)
    """Sums since the last line of metrics."""
    settings: dict[str, Any] | None = None
    """All that decides what comes of the training, if whoever asked for it said so."""


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=_step_of, default=None)


def declare_whole(checkpoint: Path, standing: CheckpointState) -> None:
    """Say of a checkpoint that everything in it is written."""
    write_json(checkpoint / _WHOLE, asdict(standing))


def standing_at(checkpoint: Path | None) -> CheckpointState:
    """Where to go on; without a checkpoint, the beginning.

    Raises
        ColdstillError: it does not say
    """
    if checkpoint is None:
        return CheckpointState()
    match read_json(checkpoint / _WHOLE):
        case {
            "step": int(step),
            "place": {"epoch": int(epoch), "sequences": int(sequences)},
            "measured": dict(measured),
            **more,
        }:
            place, said = OrderPosition(epoch, sequences), more.get("settings")
            settings = said if isinstance(said, dict) else None
            return CheckpointState(step=step, place=place, measured=measured, settings=settings)
        case other:
            raise ColdstillError(
                f"{checkpoint / _WHOLE}: {other!r} does not say where in the order of sequences "
                "training stood; delete the checkpoint, training goes on from one before it"
            )


def expect_own(checkpoint: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint says that it was made with these settings; False if it says nothing, as
    those of older versions do.

    Raises
        ColdstillError: it was made with others (the first that differs)
    """
    standing = standing_at(checkpoint)
    if standing.settings is None:
        return False
    changed = first_difference(standing.settings, json.loads(json.dumps(settings)))
    if changed is not None:
        folder = checkpoint.parent.parent
        raise ColdstillError(
            f"{checkpoint}: is of another training, with {changed}; train under a new name, or "
            f"delete {folder} to train this one anew"
        )
    return True


def expect_own_tensors(
    model: Any, missing: Collection[str], unexpected: Collection[str], stage: str
) -> None:
    """Refuse to go on from a checkpoint that lacks tensors of the model, or has others.

    Tensors that checkpoints leave out on purpose do not count: those that are tied to one that is
    there, and frozen ones.

    Raises
        ColdstillError: the first of them, and how many
    """
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    there = {place for name, place in places.items() if name not in missing}
    lost = [key for key in missing if key not in left_out and places.get(key) not in there]
    for verb, kind, keys in (("lacks", "", lost), ("has", "unknown ", list(unexpected))):
        if keys:
            tensors = f"{kind}tensor" if len(keys) == 1 else f"{kind}tensors"
            raise ColdstillError(
                f"{stage}: its last checkpoint {verb} {len(keys)} {tensors} ({', '.join(keys[:3])}"
                f"{', ...' if len(keys) > 3 else ''}); delete it, training goes on from one before "
                "it"
            )


def drop_cut_short(folder: Path) -> None:
    """Delete what nobody can go on from: it would count among those that are kept, and a whole one
    would be deleted in its place."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / _WHOLE).exists():
            shutil.rmtree(checkpoint)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """torch and safetensors have errors of their own for a disk that takes no more.

    Raises
        ColdstillError: something could not be saved
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch trips over what Ctrl-C left
            raise error.__context__ from None
        reason = str(error).splitlines()[0]
        raise ColdstillError(
            f"{folder}: cannot be written, most likely the disk is full ({reason}); what was "
            "finished is kept, free some space and run the same command again"
        ) from error
