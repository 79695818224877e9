"""Which of several processes this is, as `torchrun` tells it. One alone is rank 0 of 1."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from ..data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def rank() -> int:
    """This process's number among all, on all machines."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: which accelerator is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def wait_for_all() -> None:
    """Wait until every process is here. One alone, or one that never met the others, goes on."""
    from torch import distributed

    if is_one_of_several():
        distributed.barrier()


def sum_over_all(own: torch.Tensor) -> torch.Tensor:
    """A tensor added up over all processes, which must call this at the same time."""
    from torch import distributed

    if is_one_of_several():
        distributed.all_reduce(own)
    return own


def gather_from_all(own: list[int]) -> list[int]:
    """What each process has, one after the other; they must call this at the same time."""
    from torch import distributed

    if not is_one_of_several():
        return own
    everybodys: list[list[int]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everybodys, own)
    return [each for one in everybodys for each in one]


@contextlib.contextmanager
def lost_process_told(where: str) -> Iterator[None]:
    """Waiting for a process that has ended is an error of whatever carries messages between them.

    Raises
        ColdstillError: that happened
    """
    try:
        yield
    except RuntimeError as error:
        from torch import distributed

        # gloo, which carries them between CPUs, has no error of its own
        if is_one_of_several() and (
            isinstance(error, distributed.DistError) or "gloo" in str(error)
        ):
            raise ColdstillError(
                f"{where}: another of the {world_size()} processes has ended, and this one cannot "
                "go on without it; see what that one said, then run the same command again"
            ) from error
        raise


def is_one_of_several() -> bool:
    """Whether this process has met others that train with it."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()
