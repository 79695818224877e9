"""The rank of this process, as `torchrun` sets it. A single process is rank 0 of 1."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from ..data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def rank() -> int:
    """Rank of this process among all processes of all machines."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Rank of this process on its machine, which selects its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def wait_for_all() -> None:
    """Wait until every process calls this. Returns at once without a process group."""
    if (group := _group()) is not None:
        group.barrier()


def sum_over_all(own: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all processes, which must call this together."""
    if (group := _group()) is not None:
        group.all_reduce(own)
    return own


def gather_from_all(own: list[int]) -> list[int]:
    """The lists of all processes, concatenated. All processes must call this together."""
    if (group := _group()) is None:
        return own
    gathered: list[list[int]] = [[] for _ in range(group.get_world_size())]
    group.all_gather_object(gathered, own)
    return [each for one in gathered for each in one]


@contextlib.contextmanager
def lost_process_errors(where: str) -> Iterator[None]:
    """Turn the communication error that follows when another process has ended into one line."""
    try:
        yield
    except RuntimeError as error:
        # gloo, the backend on CPUs, raises plain RuntimeErrors
        group = _group()
        if group is not None and (isinstance(error, group.DistError) or "gloo" in str(error)):
            raise ColdstillError(
                f"{where}: another of the {world_size()} processes has ended, and this one cannot "
                "continue without it; see the error of that process, then run the command again"
            ) from error
        raise


def is_one_of_several() -> bool:
    """Whether this process has joined a group of processes that train together."""
    return _group() is not None


def _group() -> Any:
    """`torch.distributed` if this process has joined a group of processes, otherwise None."""
    from torch import distributed

    joined = distributed.is_available() and distributed.is_initialized()
    return distributed if joined else None
