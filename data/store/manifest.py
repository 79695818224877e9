"""What a store says of itself: written first, never changed, and compared before anything is added.

The manifest names the teacher, the tokenizer, the corpus, the packing and the capture. It never
names a student: any number of them read the same store.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ..codecs import CODECS, Codec
from ..errors import ColdstillError
from ..fidelity import CodecError
from ..files import json_bytes, parse_json
from ..formats import STORES, Store
from ..schema import Capture
from .layout import MANIFEST
from .seal import expect_seal, sealed, unsealed

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..places.place import Place

FORMAT_VERSION = 2
MOST_SHARDS = 1 << 20
"""Larger stores have larger shards."""
MOST_TEMPERATURE = 100.0

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
    trust_remote_code: bool = False
    """Whether code that the model brings has run; not written where none has."""


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
class Generation:
    """How the teacher answered, where its own text is what was captured."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    max_new_tokens: _Size
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
    """0 is the most probable token each time."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)]
    top_k: _Count
    """0 is all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one of several stores gave to a store that was merged from them."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    corpus: str
    """The fingerprint of its corpus, within which a sequence id means one sequence."""
    documents: _Count
    """How many documents that corpus has."""
    packing: str
    """The fingerprint of its packing."""
    sequences: _Count
    """How many of the store's sequences are its; those of the first part come first."""


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
    """Its name and settings (`codec_settings`)."""
    store: dict[str, Any] = field(default_factory=lambda: {"name": "arrow"})
    """Its name and settings (`store_settings`)."""
    error: CodecError = field(default_factory=CodecError)
    """How far the stored numbers may be, and were at first, from those captured."""
    parts: tuple[Part, ...] = ()
    """Of a merged store; empty in others."""
    generated: Generation | None = None
    """Not written where the corpus was read as it is: its packing is then that of prompts."""

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

    def block_sizes(self, shard: int) -> list[int]:
        """How many sequences each block of that shard holds."""
        rows = self.shard_rows(shard)
        starts = range(0, len(rows), self.block_sequences)
        return [min(self.block_sequences, len(rows) - start) for start in starts]

    def make_codec(self, where: object) -> Codec:
        """The codec object this store was written with."""
        codec: Codec = _registered(CODECS, self.codec, f"{where}: codec")
        return codec

    def make_store(self, where: object) -> Store:
        """The shard format this store was written with."""
        store: Store = _registered(STORES, self.store, f"{where}: store")
        return store

    def to_json(self) -> dict[str, Any]:
        """A JSON value with sorted, plain contents: equal manifests give equal bytes."""
        value: dict[str, Any] = asdict(self)
        if self.generated is None:
            del value["generated"]
        if not self.teacher.trust_remote_code:
            del value["teacher"]["trust_remote_code"]
        return sealed({"format": "coldstill", "version": FORMAT_VERSION, **value})


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(place: Place) -> Manifest:
    """Read and check the manifest of a store.

    Raises
        ColdstillError: not there, not JSON, of another format or version, or malformed
    """
    where = place.path(MANIFEST)
    try:
        content = place.read(MANIFEST)
    except FileNotFoundError as error:
        raise ColdstillError(
            f"{place}: no manifest.json there, so not a store; a run's stores are its folders "
            "logits and heldout"
        ) from error
    return parse_manifest(content, where)


def parse_manifest(content: bytes, where: str) -> Manifest:
    """A manifest from its bytes; raises as `read_manifest`."""
    value = parse_json(content, where)
    if not isinstance(value, dict) or value.get("format") != "coldstill":
        raise ColdstillError(f"{where}: not the manifest of a coldstill store")
    version = value.get("version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ColdstillError(
            f"{where}: format version {version!r:.60}, this coldstill reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    fields = {k: v for k, v in unsealed(value).items() if k not in ("format", "version")}
    try:
        # from JSON, which has no tuples; everything else must already have its own type
        manifest = _MANIFEST.validate_json(json_bytes(fields))
    except (ValidationError, ValueError) as error:
        raise ColdstillError(f"{where}: {_first_mistake(error)}") from error
    expect_seal(value, where)
    _expect_possible(manifest, where)
    manifest.make_codec(where)
    manifest.make_store(where)
    return manifest


def _expect_possible(manifest: Manifest, where: str) -> None:
    """Refuse numbers that no store has, before anything is made as large as they say."""
    capture = manifest.capture
    limits = {
        "sequences": (manifest.shards, 0, MOST_SHARDS, "shards"),
        "capture.head": (capture.head, 0, manifest.tokenizer.size, "tokens"),
        "capture.tail": (capture.tail, 0, 1 << 24, "samples"),
        "capture.seed": (abs(capture.seed), 0, 2**63, ""),
    }
    for name, (value, least, most, unit) in limits.items():
        if not least <= value <= most:
            shown = f"{value:.3g}" if value < 1e300 else "a huge number of"
            raise ColdstillError(f"{where}: {name}: {shown} {unit}, not {least} to {most:,}")
    if not all(0.0 < t <= MOST_TEMPERATURE for t in capture.temperatures):
        raise ColdstillError(
            f"{where}: capture.temperatures: above 0 and at most {MOST_TEMPERATURE:g}"
        )


def _first_mistake(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']} ({first['input']!r:.60})"


def format_settings(
    codec: str | dict[str, Any], store: str | dict[str, Any], vocabulary: int, capture: Capture
) -> dict[str, dict[str, Any]]:
    """`codec` and `store` of a manifest, for what a recipe or a command says of them: a name, or a
    table of a name and settings.

    Raises
        ColdstillError: an unknown name or setting
    """
    codec_name, wanted = _named(codec)
    kind = _known(CODECS, codec_name, "codec")
    made = _made(
        lambda: kind.fitting(vocabulary=vocabulary, capture=capture, **wanted),
        f"codec {codec_name!r}",
    )
    store_name, wanted = _named(store)
    fitting = _known(STORES, store_name, "store").fitting(compress=made.compress)
    stored = _made(lambda: replace(fitting, **wanted), f"store {store_name!r}")
    return {"codec": codec_settings(made), "store": store_settings(stored)}


def codec_settings(codec: Codec) -> dict[str, Any]:
    """What a manifest says of a codec."""
    return {"name": codec.name, **asdict(codec)}  # type: ignore[call-overload]


def store_settings(store: Store) -> dict[str, Any]:
    """What a manifest says of a store."""
    return {"name": store.name, **asdict(store)}  # type: ignore[call-overload]


def difference(
    old: Manifest, new: Manifest, sides: tuple[str, str] = ("in the store", "now")
) -> str | None:
    """The first field that differs, as `field: old in the store, new now`, or None."""
    flat_old, flat_new = _flat(old.to_json()), _flat(new.to_json())
    for key in sorted(flat_old | flat_new, key=_telling_first):
        before, now = flat_old.get(key), flat_new.get(key)
        # neither a name nor a measured error is identity
        named = key == "teacher.name" or key.startswith("error.") or key == "seal"
        if before != now and not named:
            return f"{key}: {_short(before)} {sides[0]}, {_short(now)} {sides[1]}"
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
    name, settings = _named(value)
    kind = _known(table, name, where)
    return _made(lambda: kind(**settings), f"{where} {name!r}")


def _named(value: str | dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if isinstance(value, str):
        return value, {}
    return value.get("name"), {key: v for key, v in value.items() if key != "name"}


def _known(table: dict[str, Any], name: Any, where: str) -> Any:
    if not isinstance(name, str) or name not in table:
        known = ", ".join(sorted(table))
        raise ColdstillError(f"{where} {name!r:.60} is not known to this version (known: {known})")
    return table[name]


def _made(make: Callable[[], Any], where: str) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        reason = re.sub(r"^\S+\(\) ", "", str(error))
        raise ColdstillError(f"{where}: {reason}") from error
