"""Turns a source into a store, shard by shard; several processes may share the work.

Sequence i of the store is record i of the source, so a shard is a fixed range of records. Until all
shards are there, the folder has no manifest and is not a store. What was decided, and what was left
out of each shard, is in the folder `import`.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ColdstillError
from ..files import first_difference, json_bytes, parse_json
from ..places.local import LocalPlace
from ..schema import Block
from ..store.layout import IMPORT, MANIFEST, SHARDS, TOKENIZER, claim_name, commit_name
from ..store.manifest import parse_manifest, read_manifest
from ..store.writer import ShardWriter
from ..tokenizer_files import save_tokenizer
from .measure import expect_same_fit
from .plan import Plan, fingerprint, make_plan, opened
from .reading import Tally
from .targets import block_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..places.place import Place
    from ..store.manifest import Manifest
    from .plan import Request
    from .rows import SourceRows

_PLAN, _END, _FINISH = f"{IMPORT}/plan.json", f"{IMPORT}/end.json", "claims/finish"
_PAUSE = 0.2


_SEARCHED = 1 << 24
"""Hashes of records that are compared at a time: 128 MB."""


def _note_name(shard: int) -> str:
    return f"{IMPORT}/{shard:05d}.json"


def _hashes_name(shard: int) -> str:
    return f"{IMPORT}/{shard:05d}.hashes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What became of an import."""

    manifest: Manifest | None
    """The store's; None if another process writes the last shards."""
    positions: int
    """Positions that this process wrote."""
    seconds: float


class _Stream:
    """The records of a source, read in order; going back or ahead opens it again."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._position = plan, 0
        self._parts: Iterator[SourceRows] = plan.opened
        self._left: SourceRows | None = None
        self._any = False
        self.end: int | None = None
        """The number of records, once the end was seen behind a record."""

    def read(self, start: int, count: int) -> Iterator[SourceRows]:
        """Up to `count` records from number `start` on, in parts; fewer at the end."""
        if self._position != start:
            self._parts, self._left = self._plan.kind.records(self._plan.files, start), None
            self._position, self._any = start, False
        while count:
            part = self._left if self._left is not None else next(self._parts, None)
            if part is None:
                if self._any:
                    self.end = self._position
                return
            self._any = True
            taken = min(count, len(part))
            self._left = part.part(taken, len(part)) if taken < len(part) else None
            count -= taken
            self._position += taken
            yield part.part(0, taken) if taken < len(part) else part


class Importer:
    """One import by one process."""

    def __init__(
        self,
        request: Request,
        notify: Callable[[int, int], None],
        say: Callable[[str], None],
    ) -> None:
        """Name the work.

        notify  gets the numbers of positions and of records that are done
        say     gets sentences for the user
        """
        self._request, self._notify, self._say = request, notify, say
        self._positions = self._records = 0

    def run(self) -> Result:
        """Import what no other process imports. Raises ColdstillError if the source breaks a rule,
        or the folder holds something else."""
        begun = time.monotonic()
        kind, files = opened(self._request)
        place = _writer_place(self._request.store)
        if place.exists(MANIFEST):
            manifest = read_manifest(place)
            self._expect_this(place, manifest, fingerprint(files))
            self._say("already done: " + self._request.store)
            return Result(manifest=manifest, positions=0, seconds=0.0)
        is_new = not _exists(place)
        plans: list[Plan] = []

        def begin(alone: bool) -> None:
            if alone:
                place.clear()
            plans.append(self._begun(place, kind, files))

        try:
            with place.join(begin):
                plan = plans[0]
                for sentence in plan.sentences:
                    self._say(sentence)
                self._write_shards(place, plan)
                made = self._finish(place, plan)
        except ColdstillError:
            _leave_nothing(place, is_new)
            raise
        return Result(manifest=made, positions=self._positions, seconds=time.monotonic() - begun)

    def _expect_this(self, place: Place, manifest: Manifest, files: str) -> None:
        imported = manifest.imported
        if imported is None or imported.fingerprint != files:
            raise ColdstillError(
                f"{place}: already holds a store of something else; choose another folder"
            )

    def _begun(self, place: Place, kind: Any, files: list[Any]) -> Plan:
        """The plan of the import that was begun here, or a new one."""
        identity = self._request.identity(files)
        if not place.exists(_PLAN):
            if place.names(SHARDS):
                raise ColdstillError(
                    f"{place}: holds shards of something else; choose another folder"
                )
            plan = make_plan(self._request, kind, files)
            kept = {"request": identity, "manifest": plan.manifest.to_json()}
            place.write(_PLAN, json_bytes(kept))
            return plan
        kept = parse_json(place.read(_PLAN), place.path(_PLAN))
        if changed := first_difference(kept["request"], identity):
            raise ColdstillError(
                f"{place}: holds an import with other settings: {changed}; choose another folder, "
                "or delete this one"
            )
        plan = make_plan(self._request, kind, files)
        manifest = parse_manifest(json_bytes(kept["manifest"]), place.path(_PLAN))
        return replace(plan, manifest=manifest)

    def _write_shards(self, place: Place, plan: Plan) -> None:
        stream, shard = _Stream(plan), 0
        while not place.exists(MANIFEST):  # else another process has finished the work
            end = _end(place)
            if end is not None and shard >= -(-end // plan.manifest.shard_sequences):
                return
            if not place.exists(commit_name(shard)):
                with place.claim(claim_name(shard)) as mine:
                    is_missing = mine and not place.exists(commit_name(shard))
                    if is_missing and not self._write_shard(place, plan, stream, shard):
                        return
            shard += 1

    def _write_shard(self, place: Place, plan: Plan, stream: _Stream, shard: int) -> bool:
        """Write one shard, and note the end of the source. False if the source ends before it."""
        manifest, tally = plan.manifest, Tally(skip=self._request.bad_rows == "skip")
        writer = ShardWriter(self._request.store, manifest)
        first = shard * manifest.shard_sequences
        digest, encoded, done = hashlib.sha256(), [], 0
        useful: list[bytes] = []
        while done < manifest.shard_sequences:
            wanted = min(manifest.block_sequences, manifest.shard_sequences - done)
            blocks, number = [], first + done
            for part in stream.read(number, wanted):
                if part.full is None:
                    expect_same_fit(part, plan.reading.alignment, plan.usual)
                blocks.append(block_of(part, plan.reading, number, tally))
                number += len(part)
            if not blocks:
                break
            block = Block.concatenate(blocks)
            hashes = block.sequences.hashes.astype("<u8")
            digest.update(hashes.tobytes())
            useful.append(hashes[block.sequences.positions.lengths > 0].tobytes())
            encoded.append(writer.encode(block))
            done += len(block)
            self._positions += len(block.targets)
            self._records += len(block)
            self._notify(self._positions, self._records)
            if len(block) < wanted:
                break
        if not done:
            # the source may end anywhere before: only a record just before tells that it ends here
            if first and stream.end != first and not any(True for _ in stream.read(first - 1, 1)):
                return False
            place.write(_END, json_bytes({"sequences": first}))
            return False
        if done < manifest.shard_sequences:
            place.write(_END, json_bytes({"sequences": first + done}))
        writer.use(replace(manifest, sequences=max(first + done, 1)))
        note = {
            "counts": dict(tally.counts),
            "documents": tally.documents,
            "longest": tally.longest,
            "digest": digest.hexdigest(),
        }
        place.write(_hashes_name(shard), b"".join(useful))
        place.write(_note_name(shard), json_bytes(note))
        writer.commit(shard, encoded)
        return True

    def _finish(self, place: Place, plan: Plan) -> Manifest | None:
        """Write the manifest if all shards are there."""
        if place.exists(MANIFEST):
            return read_manifest(place)
        end = _end(place)
        shards = range(-(-(end or 0) // plan.manifest.shard_sequences))
        if not end or not all(place.exists(commit_name(shard)) for shard in shards):
            return None
        with place.claim(_FINISH) as mine:
            if not mine:
                return None
            if place.exists(MANIFEST):
                return read_manifest(place)
            notes = [parse_json(place.read(_note_name(s)), _note_name(s)) for s in shards]
            repeated = _repeated(place, shards, end)
            manifest = _final(plan.manifest, notes, end, repeated, self._request.sequence_length)
            if not place.exists(TOKENIZER):
                writer = ShardWriter(self._request.store, manifest)
                with place.scratch() as folder:
                    save_tokenizer(self._request.tokenizer, folder / TOKENIZER)
                    writer.add_tokenizer(folder / TOKENIZER)
            place.write(MANIFEST, json_bytes(manifest.to_json()))
        place.remove(IMPORT)
        assert manifest.imported is not None
        for what, count in manifest.imported.counts.items():
            self._say(f"{count:,} {what}")
        return manifest


def _repeated(place: Place, shards: range, sequences: int) -> int:
    """How many records repeat the tokens, borders and supervision of another one. The hashes are
    compared in parts, so that memory does not grow with the source."""
    found, parts = 0, -(-sequences // _SEARCHED)
    for part in range(parts):
        chosen = []
        for shard in shards:
            try:
                hashes = np.frombuffer(place.read(_hashes_name(shard)), "<u8")
            except FileNotFoundError:
                raise ColdstillError(
                    f"{place}: was begun by an older version; delete it and import again"
                ) from None
            chosen.append(hashes if parts == 1 else hashes[hashes % parts == part])
        together = np.concatenate(chosen)
        found += len(together) - len(np.unique(together))
    return found


def _final(
    manifest: Manifest,
    notes: list[dict[str, Any]],
    sequences: int,
    repeated: int,
    length: int | None,
) -> Manifest:
    counts: Counter[str] = Counter({"records that repeat another one, kept": repeated})
    digest = hashlib.sha256()
    for note in notes:
        counts.update(note["counts"])
        digest.update(note["digest"].encode())
    documents = sum(note["documents"] for note in notes)
    together = documents > sequences
    assert manifest.imported is not None
    return replace(
        manifest,
        sequences=sequences,
        corpus=replace(manifest.corpus, fingerprint=digest.hexdigest(), documents=documents),
        packing=replace(
            manifest.packing,
            sequence_length=length or max(2, *(note["longest"] for note in notes)),
            together=together,
            isolation="positions" if together else "single",
            fingerprint=digest.hexdigest(),
        ),
        imported=replace(manifest.imported, counts={k: v for k, v in sorted(counts.items()) if v}),
    )


def _end(place: Place) -> int | None:
    """The number of records of the source, once a process has reached its end."""
    try:
        return int(parse_json(place.read(_END), place.path(_END))["sequences"])
    except FileNotFoundError:
        return None


def _writer_place(store: str) -> Place:
    from ..places.place import place_at

    return place_at(store)


def _exists(place: Place) -> bool:
    return not isinstance(place, LocalPlace) or place.root.exists()


def _leave_nothing(place: Place, is_new: bool) -> None:
    """Delete what a refused import has begun, unless a shard is finished or others are writing."""
    with contextlib.suppress(ColdstillError), place.lock():
        if place.exists(MANIFEST) or any(n.endswith(".json") for n in place.names(SHARDS)):
            return
        place.clear()
        place.remove(IMPORT)
        place.remove(SHARDS)
    if is_new and isinstance(place, LocalPlace):
        for folder in ("claims", "."):
            with contextlib.suppress(OSError):
                (place.root / folder).rmdir()
