"""The teacher's cache in numbers: what it took, what it spared, what its codec cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..pages.inspect.path import Subject
from ..pages.inspect.store import describe

if TYPE_CHECKING:
    from ...data.store.reader import StoreReader

_LOGIT_BYTES = 2
"""Of a logit in 16 bits, as one would store them all."""
_KEPT = (
    "path", "shards", "shards_done", "sequences", "tokens", "positions", "bytes",
    "bytes_per_position", "teacher_loss", "teacher_entropy", "head_mass", "codec_kl", "histograms",
    "measurements",
)  # fmt: skip


def record_facts(store: StoreReader) -> dict[str, Any]:
    """From manifest, commit records and measurements: no sequence is read.

    Raises
        ColdstillError: a commit record is damaged
    """
    found = describe(Subject(store=store, path=str(store.place))).to_json()
    manifest = found["manifest"]
    vocabulary = manifest["tokenizer"]["size"]
    keys = ("capture", "codec", "store", "error")
    return {
        **{key: found[key] for key in _KEPT},
        **{key: manifest[key] for key in keys},
        "planned_sequences": manifest["sequences"],
        "vocabulary": vocabulary,
        "full_logits_bytes": found["positions"] * vocabulary * _LOGIT_BYTES,
    }
