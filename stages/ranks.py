"""Which of several processes this is, as `torchrun` tells it. One alone is rank 0 of 1."""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number among all, on all machines."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine: which accelerator is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))
