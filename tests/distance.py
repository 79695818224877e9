"""Remote stores: in memory, and behind the S3 protocol on loopback with network errors."""

from __future__ import annotations

import hashlib
import itertools
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import coldstill.data.places.remote
import pytest
from coldstill.data.places.cache import CacheSettings
from coldstill.data.places.faults import Patience
from coldstill.data.places.objects import Objects
from coldstill.data.places.remote import RemotePlace
from coldstill.data.store.layout import LOCK
from faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICK = Patience(tries=6, delay=0.001, longest=0.01)
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Distance:
    """An address with a local cache."""

    url: str
    cache: CacheSettings
    proxy: FaultyProxy | None = None

    def place(self, name: str = "store", **options: Any) -> RemotePlace:
        """One folder in a remote place."""
        return RemotePlace(f"{self.url}/{name}", self.cache, **options)

    @property
    def network(self) -> FaultyProxy:
        """The unreliable network of a place that has one."""
        assert self.proxy is not None
        return self.proxy

    def digests(self, name: str = "store") -> dict[str, str]:
        """The hash of every object of a store except its lock."""
        place = self.place(name)
        return {
            inner.removeprefix("./"): hashlib.sha256(
                place.read(inner.removeprefix("./"))
            ).hexdigest()
            for inner in place.sizes(".")
            if inner != f"./{LOCK}"
        }


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only briefly between two attempts."""
    monkeypatch.setattr(coldstill.data.places.remote, "PATIENCE", QUICK)


@pytest.fixture
def memory(tmp_path: Path) -> Distance:
    """The `memory://` of this process."""
    pytest.importorskip("fsspec")
    cache = CacheSettings(folder=tmp_path / "cache")
    return Distance(f"memory://coldstill-{next(_numbers)}", cache)


@pytest.fixture
def conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Atomic requests, which object stores have and `memory://` does not."""
    one_at_a_time, original = threading.RLock(), Objects._call

    def call(self: Objects, *arguments: Any) -> Any:
        with one_at_a_time:
            return original(self, *arguments)

    monkeypatch.setattr(Objects, "_call", call)


ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "user",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "NO_PROXY": "127.0.0.1",
}
"""Dummy credentials instead of the user's own."""


@pytest.fixture(scope="session")
def _s3_network() -> Iterator[FaultyProxy]:
    """An S3 server in this process behind an unreliable network."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    with FaultyProxy(*running.get_host_and_port()) as proxy:
        yield proxy
    running.stop()


@pytest.fixture
def s3(
    _s3_network: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Distance]:
    """A new bucket."""
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": _s3_network.url}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{next(_numbers)}"
    connect().mkdir(bucket)
    _s3_network.log.clear()
    yield Distance(f"s3://{bucket}", CacheSettings(folder=tmp_path / "cache"), _s3_network)
    _s3_network.faults.clear()


def connect() -> Any:
    """The server's file system, independent of the connections of the project."""
    import fsspec

    return fsspec.filesystem("s3", use_listings_cache=False)


@pytest.fixture(params=["memory", "s3"])
def far(request: pytest.FixtureRequest) -> Distance:
    """A place in memory, and one in S3."""
    found: Distance = request.getfixturevalue(request.param)
    return found
