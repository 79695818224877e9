"""What a store says of itself: written first, never changed, and compared before anything is added.

The manifest names the teacher, the tokenizer, the corpus, the packing and the capture. It never
names a student: any number of them read the same store.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from .codecs import CODECS, Codec
from .errors import ColdstillError
from .files import read_json
from .schema import Capture
from .stores import STORES, Store

if TYPE_CHECKING:
    from pathlib import Path

FORMAT_VERSION = 1

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
_STRICT: Any = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherIdentity:
    """Which model spoke."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: str
    """As the recipe names it; information, not identity."""
    fingerprint: str
    """SHA-256 over its configuration and weight files."""
    family: str
    dtype: str
    parameters: _Count
    bytes: _Count
    """Size of its weight files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerIdentity:
    """What its ids mean; the tokenizer itself lies beside the manifest."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    fingerprint: str
    """SHA-256 of the table of tokens and ids."""
    size: _Size
    """V: the real vocabulary; logits past it are padding and were never looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusIdentity:
    """What was read."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    fingerprint: str
    """SHA-256 over the content of every document of the split, in order."""
    split: Literal["train", "heldout"]
    documents: _Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How documents became sequences."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    sequence_length: Annotated[int, Field(ge=2, le=2**31 - 1)]
    """T: the longest a sequence can be."""
    together: bool
    """Whether a sequence may hold several documents."""
    isolation: Literal["positions", "mask", "single"]
    """How the teacher kept them apart: positions that restart, a 4-d mask, or one to a sequence."""
    separator: tuple[_Count, ...]
    """The ids that were put after each plain document."""
    fingerprint: str
    """SHA-256 over every sequence: its tokens, document borders and supervised positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a reader needs besides the shards."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    corpus: CorpusIdentity
    packing: Packing
    capture: Capture
    sequences: _Count
    """N: how many sequences the whole store holds."""
    shard_sequences: _Size
    """How many of them a shard holds (the last may hold fewer)."""
    block_sequences: _Size
    """How many a block inside a shard holds, likewise."""
    codec: dict[str, Any] = field(default_factory=lambda: {"name": "plain"})
    store: dict[str, Any] = field(default_factory=lambda: {"name": "arrow"})

    @property
    def shards(self) -> int:
        """How many shards the whole store has."""
        return -(-self.sequences // self.shard_sequences)

    def shard_rows(self, shard: int) -> range:
        """Which of the store's sequences shard number `shard` holds."""
        start = shard * self.shard_sequences
        return range(start, min(start + self.shard_sequences, self.sequences))

    def block_rows(self, shard: int, block: int) -> range:
        """Which of the store's sequences block number `block` of that shard holds."""
        start = block * self.block_sequences
        return self.shard_rows(shard)[start : start + self.block_sequences]

    def make_codec(self, where: Path) -> Codec:
        """The codec object this store was written with."""
        codec: Codec = _registered(CODECS, self.codec, f"{where}: codec")
        return codec

    def make_store(self, where: Path) -> Store:
        """The shard format this store was written with."""
        store: Store = _registered(STORES, self.store, f"{where}: store")
        return store

    def to_json(self) -> dict[str, Any]:
        """A JSON value with sorted, plain contents: equal manifests give equal bytes."""
        value: dict[str, Any] = asdict(self)
        return {"format": "coldstill", "version": FORMAT_VERSION, **value}


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises
        ColdstillError: not there, not JSON, of another format or version, or malformed
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != "coldstill":
        raise ColdstillError(f"{path}: not the manifest of a coldstill store")
    if value.get("version") != FORMAT_VERSION:
        raise ColdstillError(
            f"{path}: format version {value.get('version')!r}, this coldstill reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    content = {k: v for k, v in value.items() if k not in ("format", "version")}
    try:
        # JSON has no tuples; everything else must already have its own type
        return _MANIFEST.validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ColdstillError(f"{path}: {place}: {first['msg']} ({first['input']!r:.60})") from error


def difference(old: Manifest, new: Manifest) -> str | None:
    """The first field that differs, as `field: old, new`, or None; names are not identity."""
    flat_old, flat_new = _flat(old.to_json()), _flat(new.to_json())
    for key in sorted(flat_old | flat_new, key=_telling_first):
        before, now = flat_old.get(key), flat_new.get(key)
        if before != now and key != "teacher.name":
            return f"{key}: {_short(before)} in the store, {_short(now)} now"
    return None


def _telling_first(key: str) -> tuple[int, str]:
    # a changed corpus also changes the packing's fingerprint and the counts: name the cause
    order = ["teacher", "tokenizer", "corpus", "packing", "capture", "codec", "store"]
    order += ["sequences", "shard_sequences"]
    section = key.split(".")[0]
    is_digest = key.endswith(("fingerprint", "bytes", "parameters"))
    return (order.index(section) * 2 + is_digest if section in order else 99, key)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 16 else text[:12] + "..."


def _registered(table: dict[str, Any], value: dict[str, Any], where: str) -> Any:
    settings = dict(value)
    name = settings.pop("name", None)
    if not isinstance(name, str) or name not in table:
        known = ", ".join(sorted(table))
        raise ColdstillError(f"{where} {name!r} is not known to this version (known: {known})")
    try:
        return table[name](**settings)
    except TypeError as error:
        raise ColdstillError(f"{where} {name!r}: {error}") from error
