"""The connection to a Ray cluster, and what its workers ask for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....data.errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...recipe.work import Work


_PATIENCE = 10.0
"""Most seconds until a cluster answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The workers that a step asks Ray for."""

    address: str = ""
    """Address of the cluster. If empty: the one that RAY_ADDRESS names or that runs on this
    machine, otherwise a new one on this machine alone."""
    workers: int
    """Most workers at a time; as many of them run as the cluster has room for."""
    gpus: int | None = None
    """GPUs of each worker; if None, one if the cluster has any."""
    cpus: int = 1
    """CPUs of each worker, and threads of its model if that runs on CPUs."""

    def needs(self, ray: Any) -> dict[str, int]:
        """The resources of one worker, as options of Ray."""
        gpus = self.gpus
        if gpus is None:
            gpus = min(1, int(ray.cluster_resources().get("GPU", 0)))
        return {"num_cpus": self.cpus, "num_gpus": gpus}


def needs_text(needs: dict[str, int]) -> str:
    """The resources of a worker in words."""
    return ", ".join(f"{count} {name[4:-1].upper()}" for name, count in needs.items() if count)


@contextlib.contextmanager
def connected(pool: Pool) -> Iterator[Any]:
    """Connect to the cluster, and yield the module `ray`. A connection of the caller is kept.

    Raises
        ColdstillError: there is no cluster at the address
    """
    import ray

    from ....stages.libraries import asking

    if ray.is_initialized():
        yield ray
        return
    # Ray would report its use, and would warn of a change that does not concern these workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with asking("ray", "connect", where=f"--ray {pool.address}".rstrip()):
            ray.init(
                address=pool.address or None,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=None if pool.address else False,
            )
        yield ray
    finally:
        ray.shutdown()


def expect_reachable(pool: Pool) -> None:
    """Refuse an address where nothing answers before any work: Ray would try it for ten minutes.

    Raises
        ColdstillError: Ray is not installed, the address is not one of Ray's, or nothing listens
            there
    """
    # looked up, not imported: Ray takes seconds, and a finished step does not need it
    if importlib.util.find_spec("ray") is None:
        raise ColdstillError(
            "--ray: needs the package ray; install it with pip install 'coldstill[ray]'"
        )
    address = pool.address
    if address in ("", "auto", "local"):
        return
    found = re.fullmatch(r"(?:ray://)?([^/]+):(\d{1,5})", address)
    if found is None:
        raise ColdstillError(f"--ray {address}: expected HOST:PORT, the address of a Ray cluster")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), _PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ColdstillError(
            f"--ray {address}: nothing answers there ({first_line(error)}); start a cluster with "
            "ray start --head, or leave the address out for one on this machine"
        ) from error


def at_worker(work: Work, folder: str, report: Callable[[Any], None], threads: int) -> Work:
    """Return the work of the driver for a worker on any machine.

    folder   the driver's folder, which relative paths start from
    report   receives the reports
    threads  threads of torch on CPUs; how sums are rounded depends on them

    Raises
        ColdstillError: this machine does not have the folder
    """
    from ...quiet import quiet_imports, quiet_libraries

    try:
        os.chdir(folder)
    except OSError as error:
        raise ColdstillError(
            f"{folder}: not on {os.uname().nodename}, which Ray chose for a worker; start in a "
            "folder of a disk that all machines share"
        ) from error
    quiet_imports()
    import torch

    torch.set_num_threads(threads)
    quiet_libraries()
    return dataclasses.replace(work, report=report)


def cause(error: Exception) -> Exception:
    """The exception that a worker raised, without the text that Ray adds to it."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, Exception) else error
