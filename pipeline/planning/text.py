"""A plan for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..units import size

if TYPE_CHECKING:
    from collections.abc import Sequence

Facts = dict[str, Any]


def text(facts: Facts) -> str:
    """All of a plan, a line a thing; what is estimated says so."""
    return "\n".join(
        [
            *_ground(facts),
            *[_store(split, store) for split, store in facts["stores"].items()],
            *_students(facts),
            *_needs(facts),
            *_alternatives(facts),
            _disk(facts),
        ]
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells in columns, numbers to the right; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]


def duration(hours: float) -> str:
    """Hours for people."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    minutes = hours * 60
    return f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{hours * 3600:.0f} seconds"


def _ground(facts: Facts) -> list[str]:
    about = "" if facts["counted"] else "about "
    positions = sum(facts["positions"].values())
    learned = f"{about}{positions:,} positions"
    learned += f" ({about}{facts['supervised_share']['train']:.1%} of train's tokens supervised)"
    basis = [f"note         corpus: {facts['basis']}"] if facts["basis"] else []
    rowless = [
        f"tokenizer    without {', '.join(map(repr, facts['left_out_tokens']))}, which the model "
        "has no row for"
    ]
    return [
        f"corpus       {_counted(facts['sources'], 'file')}, {size(facts['source_bytes'])}, "
        f"{about}{sum(facts['sequences'].values()):,} sequences, {learned}",
        *basis,
        f"teacher      {facts['teacher']}{'' if facts['teacher_done'] else ', not yet'}",
        *(rowless if facts["left_out_tokens"] else ()),
    ]


def _store(split: str, store: Facts) -> str:
    about = "" if store["counted"] else "about "
    width = f"{'' if store['measured'] else 'about '}{store['bytes_per_position']:g} bytes"
    done, shards = store["shards_done"], store["shards"]
    state = f"{done} of {shards} shards" if done else "to do"
    if 0 < done < shards:
        state += f", {shards - done} missing"
    whole = size(store["bytes"]) + ("" if done else f" in {_counted(shards, 'shard')}")
    where = "" if store["address"] is None else f", in {store['address']}"
    return (
        f"{split:<12} {about}{store['positions']:,} positions in "
        f"{store['sequences']:,} sequences at {width}: {whole}, {state}{where}"
    )


def _students(facts: Facts) -> list[str]:
    lines = []
    for name, student in facts["students"].items():
        count = student["parameters"]
        large = "" if count is None else f"{count:,} parameters, "
        lines.append(
            f"student      {name}: {large}{student['steps']:,} steps of "
            f"{student['tokens'] // student['steps']:,} tokens, "
            f"{'trained' if student['done'] else 'to do'}"
        )
        if student["note"] is not None:
            lines.append(f"note         {student['note']}")
        if student["not_exported_to"]:
            formats = ", ".join(student["not_exported_to"])
            lines.append(
                f"note         students.{name}: a student of this family cannot be exported to "
                f"{formats}"
            )
    return lines


def _needs(facts: Facts) -> list[str]:
    lines = []
    for stage, needed in facts["memory"].items():
        taken = "unknown" if needed is None else f"about {size(needed)}"
        if needed is None:
            taken += ", its model is not on this machine"
        hours = facts["hours"][stage]
        left = f"; {duration(hours)} to go" if hours else ""
        if left and stage == "teacher-logits":
            left += f" at {facts['tokens_per_second']:,.0f} tokens/s"
        lines.append(f"memory       {stage}: {taken}{left}")
    return lines


def _alternatives(facts: Facts) -> list[str]:
    """This capture's size among others'."""
    own = facts["stores"]["train"]
    this = {**facts["capture"], "codec": facts["codec"], "this": True}
    this |= {key: own[key] for key in ("bytes_per_position", "measured", "bytes")}
    rows = [["head", "tail", "codec", "bytes/position", "in all", ""]]
    for way in [this, *facts["alternatives"]]:
        about = "" if way["measured"] else "~"
        rows.append(
            [
                *[str(way[key]) for key in ("head", "tail", "codec")],
                f"{about}{way['bytes_per_position']:g}",
                size(way["bytes"]),
                "this recipe" if way.get("this") else "",
            ]
        )
    heading, *lines = [f"{' ' * 13}{line}".rstrip() for line in aligned(rows)]
    return [f"kept{heading[4:]}", *lines]


def _counted(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _disk(facts: Facts) -> str:
    """What is still needed of this machine's disk, and for what."""
    stores = facts["stores"].values()
    here = [store["bytes_missing"] for store in stores if store["address"] is None]
    distant = sum(store["bytes"] for store in stores if store["address"] is not None)
    names = ["no store", "one store", "both stores"][len(here)]
    needed, what = sum(here), names
    if len(here) < len(stores):
        needed += min(distant, facts["cache_bytes"])
        what = f"{names} and the cache of the other" if here else "the cache"
    free = facts["free_bytes"]
    enough = "" if needed <= free else ": not enough"
    more = f"{size(needed)} more for {what}" if needed else "nothing more to write"
    return f"disk         {more}, {size(free)} free{enough}"
