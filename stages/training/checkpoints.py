"""Checkpoints of a training: which are complete, and the state that each one holds."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError

from ...data.errors import ColdstillError
from ...data.files import first_difference, read_json, write_json
from .feed import OrderPosition

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

_WHOLE = "whole.json"
"""Written into a checkpoint last. A checkpoint without it is incomplete."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """The state of a training at a checkpoint, besides the state that the Trainer saves."""

    step: int
    place: OrderPosition
    """The position in the order of sequences."""
    measured: dict[str, float]
    """Metric sums since the last line of metrics."""
    settings: dict[str, Any] | None = None
    """All settings that decide the result of the training, if they are known."""


_STATE = TypeAdapter(CheckpointState)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def declare_whole(checkpoint: Path, state: CheckpointState) -> None:
    write_json(checkpoint / _WHOLE, asdict(state))


def checkpoint_state(checkpoint: Path | None) -> CheckpointState:
    """The state to resume from; without a checkpoint, the state at the start.

    Raises
        ColdstillError: the checkpoint does not hold it
    """
    if checkpoint is None:
        return CheckpointState(step=0, place=OrderPosition(), measured={})
    found = read_json(checkpoint / _WHOLE)
    try:
        return _STATE.validate_python(found)
    except ValidationError as error:
        raise ColdstillError(
            f"{checkpoint / _WHOLE}: {found!r} does not hold the position in the order of "
            "sequences; delete the checkpoint to resume from an earlier one"
        ) from error


def expect_own(checkpoint: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was made with these settings; False if it does not record its settings,
    as in older versions."""
    state = checkpoint_state(checkpoint)
    if state.settings is None:
        return False
    changed = first_difference(state.settings, json.loads(json.dumps(settings)))
    if changed is not None:
        folder = checkpoint.parent.parent
        raise ColdstillError(
            f"{checkpoint}: is of another training, with {changed}; train under a new name, or "
            f"delete {folder} to train it again"
        )
    return True


def expect_own_tensors(
    model: Any, missing: Collection[str], unexpected: Collection[str], stage: str
) -> None:
    """Refuse to resume from a checkpoint that lacks tensors of the model or has unknown ones.

    Frozen tensors, and tensors tied to one that exists, may be missing: checkpoints omit them.
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
                f"{', ...' if len(keys) > 3 else ''}); delete it to resume from an earlier "
                "checkpoint"
            )


def drop_cut_short(folder: Path) -> None:
    """Delete incomplete checkpoints. They would count towards `save_total_limit`, and a complete
    checkpoint would be deleted in their place."""
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / _WHOLE).exists():
            shutil.rmtree(checkpoint)


@contextlib.contextmanager
def full_disk_errors(folder: Path) -> Iterator[None]:
    """Turn the errors of torch and safetensors for a full disk into one line.

    Raises
        ColdstillError: something could not be saved
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch fails after Ctrl-C
            raise error.__context__ from None
        reason = str(error).splitlines()[0]
        raise ColdstillError(
            f"{folder}: cannot be written, most likely the disk is full ({reason}); what was "
            "finished is kept, free some space and run the same command again"
        ) from error
