"""The manifest of a store: never changed, and compared before shards are added.

It names the teacher, the tokenizer, the corpus, the packing and the capture. It does not name the
students that read it, of which there can be any number.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter

from ..codecs import CODECS, READABLE, Codec, CodecError
from ..errors import ColdstillError
from ..files import parse_json
from ..formats import STORES, Store
from ..schema import Capture
from .layout import MANIFEST, MEASUREMENTS, expect_seal, sealed, unsealed, validated
from .provenance import Generation, Imported, Writing
from .retokenized import Retokenized

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..places.place import Place

FORMAT_VERSION = max(READABLE)
MOST_SHARDS = 1 << 20
"""The most shards of a store; larger stores need larger shards."""
MOST_TEMPERATURE = 100.0

_Count = Annotated[int, Field(ge=0, le=2**62)]
_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
_STRICT: Any = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """The program that ran the teacher, if that was not transformers."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: str
    version: str
    options: dict[str, Any] = field(default_factory=dict)
    """Its options, as the recipe gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherIdentity:
    """The model whose outputs were captured."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    name: str
    """The name in the recipe; informative, not compared."""
    fingerprint: str
    """SHA-256 over its configuration and weight files."""
    family: str
    dtype: str
    parameters: _Count
    bytes: _Count
    """Size of the weight files."""
    trust_remote_code: bool = False
    """Whether code of the model's repository has run; written only if true."""
    weights: str = ""
    """How a file stored the weights before they were dequantised; written only if not empty."""
    engine: EngineIdentity | None = None
    """Written only if it was not transformers."""
    other_engines: tuple[EngineIdentity | None, ...] = ()
    """Engines that continued the store; None is transformers. Written only if not empty."""

    @property
    def engines(self) -> tuple[EngineIdentity | None, ...]:
        """All engines whose shards the store has."""
        return (self.engine, *self.other_engines)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerIdentity:
    """The tokenizer, whose files are beside the manifest."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    fingerprint: str
    """SHA-256 of the table of tokens and ids."""
    size: _Size
    """V, the number of tokens. Logits beyond V are padding and are not captured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusIdentity:
    """The corpus that was captured."""

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
    """T, the most tokens of a sequence."""
    together: bool
    """Whether a sequence may hold several documents."""
    isolation: Literal["positions", "mask", "single", "documents"]
    """How documents were kept apart: restarting positions, a 4-d mask, one per sequence, or one per
    request to an engine."""
    separator: tuple[_Count, ...]
    """The token ids added after each plain document."""
    fingerprint: str
    """SHA-256 over the tokens, document borders and supervised positions of all sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One of the stores that a merged store was made of."""

    __pydantic_config__: ClassVar[Any] = _STRICT
    corpus: str
    """The fingerprint of its corpus. Sequence ids are unique in one corpus."""
    documents: _Count
    """Number of documents of its corpus."""
    packing: str
    """The fingerprint of its packing."""
    sequences: _Count
    """Number of its sequences in the merged store; those of the first part come first."""


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
    """N, the number of sequences of the complete store."""
    shard_sequences: _Size
    """Sequences per shard; the last shard may hold fewer."""
    block_sequences: _Size
    """Sequences per block; the last block of a shard may hold fewer."""
    codec: dict[str, Any] = field(default_factory=lambda: {"name": "plain"})
    """Name and settings of the codec."""
    store: dict[str, Any] = field(default_factory=lambda: {"name": "arrow"})
    """Name and settings of the store format."""
    error: CodecError = field(default_factory=CodecError)
    """The error of the stored numbers: its bound, and the measured one of the first block."""
    parts: tuple[Part, ...] = ()
    """The parts of a merged store; empty in others."""
    generated: Generation | None = None
    """How the teacher answered prompts; None if it did not. `packing` is that of the prompts."""
    written: Writing | None = None
    """Who wrote the sequences; None unless a student did. Each holds prompts with their answers."""
    retokenized: Retokenized | None = None
    """How the store was written in a student's tokens, if it was."""
    imported: Imported | None = None
    """Where the targets come from, if another program wrote them. Written only then."""
    version: int = FORMAT_VERSION
    """The format version, one of `READABLE`."""

    @property
    def shards(self) -> int:
        """The number of shards of the complete store."""
        return -(-self.sequences // self.shard_sequences)

    def shard_rows(self, shard: int) -> range:
        """The range of sequences in one shard."""
        start = shard * self.shard_sequences
        return range(start, min(start + self.shard_sequences, self.sequences))

    def blocks(self, shard: int) -> int:
        """The number of blocks of one shard."""
        return -(-len(self.shard_rows(shard)) // self.block_sequences)

    def block_rows(self, shard: int, block: int) -> range:
        """The range of sequences in one block of a shard."""
        start = block * self.block_sequences
        return self.shard_rows(shard)[start : start + self.block_sequences]

    def block_sizes(self, shard: int) -> list[int]:
        """The number of sequences in each block of a shard."""
        rows = self.shard_rows(shard)
        starts = range(0, len(rows), self.block_sequences)
        return [min(self.block_sequences, len(rows) - start) for start in starts]

    def make_codec(self, where: object) -> Codec:
        codec: Codec = _registered(READABLE[self.version], self.codec, f"{where}: codec")
        return codec

    def make_store(self, where: object) -> Store:
        store: Store = _registered(STORES, self.store, f"{where}: store")
        return store

    def to_json(self) -> dict[str, Any]:
        """The manifest as a sealed JSON value."""
        value: dict[str, Any] = {k: v for k, v in asdict(self).items() if v is not None}
        usual = {"chunks": False, "branches": False, "guessed_labels": False, "mass": True}
        value["capture"] = {k: v for k, v in value["capture"].items() if usual.get(k) is not v}
        for name in ("trust_remote_code", "weights", "engine", "other_engines"):
            if not value["teacher"][name]:
                del value["teacher"][name]
        if "retokenized" in value and not value["retokenized"]["branches"]:
            del value["retokenized"]["branches"], value["retokenized"]["spelled_mass"]
        version = value.pop("version")
        return sealed({"format": "coldstill", "version": version, **value})


_MANIFEST = TypeAdapter(Manifest)


def read_manifest(place: Place) -> Manifest:
    """Read and check the manifest of a store. Raises ColdstillError if the manifest is missing, not
    JSON, of another format or version, or malformed."""
    where = place.path(MANIFEST)
    try:
        content = place.read(MANIFEST)
    except FileNotFoundError as error:
        raise ColdstillError(
            f"{place}: no manifest.json there, so not a store; a run's stores are its folders "
            "logits and heldout"
        ) from error
    return parse_manifest(content, where)


def read_measurements(place: Place) -> dict[str, Any]:
    """What the capture measured; empty if the file is missing or damaged."""
    if not place.exists(MEASUREMENTS):
        return {}
    try:
        found = parse_json(place.read(MEASUREMENTS), place.path(MEASUREMENTS))
    except ColdstillError:
        return {}
    return found if isinstance(found, dict) else {}


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest; raises the errors of `read_manifest`."""
    value = parse_json(content, where)
    if not isinstance(value, dict) or value.get("format") != "coldstill":
        raise ColdstillError(f"{where}: not the manifest of a coldstill store")
    version = value.get("version")
    if type(version) is not int or version not in READABLE:
        raise ColdstillError(
            f"{where}: format version {version!r:.60}, this coldstill reads "
            f"{' and '.join(map(str, READABLE))}; use the version that wrote it"
        )
    fields = {k: v for k, v in unsealed(value).items() if k != "format"}
    manifest = validated(_MANIFEST, fields, where)
    expect_seal(value, where)
    _expect_possible(manifest, where)
    manifest.make_codec(where)
    manifest.make_store(where)
    return manifest


def _expect_possible(manifest: Manifest, where: str) -> None:
    """Refuse impossible numbers before anything is allocated by them."""
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


def format_settings(
    codec: str | dict[str, Any], store: str | dict[str, Any], vocabulary: int, capture: Capture
) -> dict[str, dict[str, Any]]:
    """The fields `codec` and `store` of a manifest, from a recipe or a command: each is a name, or
    a table with a name and settings. Raises ColdstillError for an unknown name or setting."""
    codec_name, wanted = _named(codec)
    kind = _known(CODECS, codec_name, "codec")
    made = _made(
        lambda: kind.fitting(vocabulary=vocabulary, capture=capture, **wanted),
        f"codec {codec_name!r}",
    )
    store_name, wanted = _named(store)
    fitting = _known(STORES, store_name, "store").fitting(compress=made.compress)
    stored = _made(lambda: replace(fitting, **wanted), f"store {store_name!r}")
    return {"codec": settings_of(made), "store": settings_of(stored)}


def settings_of(made: Codec | Store) -> dict[str, Any]:
    """Name and settings of a codec or a store format."""
    settings = asdict(made)  # type: ignore[call-overload]
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    return {"name": made.name, **plain}


def difference(
    old: Manifest, new: Manifest, sides: tuple[str, str] = ("in the store", "now")
) -> str | None:
    """The first field that differs, as `field: old in the store, new now`; None if none does. An
    engine does not count as different if shards of the store were made by it."""
    if new.teacher.engine in old.teacher.engines:
        new = with_engine(new, old)
    if old.version != new.version:
        # the store's format had other defaults, and its codec had no setting `frequent`
        same_store = old.store["name"] == new.store["name"]
        codec = {k: v for k, v in new.codec.items() if k in old.codec}
        new = replace(
            new, version=old.version, codec=codec, store=old.store if same_store else new.store
        )
    flat_old, flat_new = _flat(old.to_json()), _flat(new.to_json())
    for key in sorted(flat_old | flat_new, key=_causes_first):
        before, now = flat_old.get(key), flat_new.get(key)
        # a name and what follows from the first block are not part of the identity
        named = key in ("teacher.name", "seal", "codec.frequent")
        if before != now and not (named or key.startswith("error.")):
            return f"{key}: {_short(before)} {sides[0]}, {_short(now)} {sides[1]}"
    return None


def with_engine(manifest: Manifest, of: Manifest) -> Manifest:
    """A manifest with what another one says of the engines. Another engine also has another way to
    keep documents apart, which says nothing about the record."""
    theirs, packing = of.teacher, manifest.packing
    if manifest.teacher.engine != theirs.engine:
        packing = replace(packing, isolation=of.packing.isolation)
    teacher = replace(manifest.teacher, engine=theirs.engine, other_engines=theirs.other_engines)
    return replace(manifest, teacher=teacher, packing=packing)


def _causes_first(key: str) -> tuple[int, str]:
    # Name the cause: a changed corpus also changes the packing's fingerprint and the counts.
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
