"""A plan and a pilot's figures as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabulate import tabulate

from ..units import counted, duration, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .pilot_record import PilotRecord, PilotRow
    from .plan import Plan
    from .sizes import StoreSize


def plan_text(plan: Plan) -> str:
    """All of a plan, one subject per line; estimates are marked with "about"."""
    return "\n".join(
        [
            *_corpus_and_teacher(plan),
            *[_store(split, store) for split, store in plan.stores.items()],
            *_students(plan),
            *_own_tokens(plan),
            *_own_text(plan),
            *_stages(plan),
            *_captures(plan),
            _disk(plan),
        ]
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, aligned to the right; the first row is the heading."""
    table = tabulate(rows, tablefmt="plain", stralign="right", disable_numparse=True)
    return [line.rstrip() for line in table.splitlines()]


def _corpus_and_teacher(plan: Plan) -> list[str]:
    about = "" if plan.counted else "about "
    lines = [
        f"corpus       {counted(plan.sources, 'file')}, {size(plan.source_bytes)}, "
        f"{about}{sum(plan.sequences.values()):,} sequences, "
        f"{about}{sum(plan.positions.values()):,} positions "
        f"({about}{plan.supervised_share['train']:.1%} of train's tokens supervised)"
    ]
    if plan.basis:
        lines.append(f"note         corpus: {plan.basis}")
    lines.append(f"teacher      {plan.teacher}{'' if plan.teacher_done else ', not yet'}")
    if plan.left_out_tokens:
        tokens = ", ".join(map(repr, plan.left_out_tokens))
        lines.append(f"tokenizer    without {tokens}, for which the model has no row")
    return lines


def _store(split: str, store: StoreSize) -> str:
    about = "" if store.counted else "about "
    width = f"{'' if store.measured else 'about '}{store.bytes_per_position:g} bytes"
    done, shards = store.shards_done, store.shards
    state = f"{done} of {shards} shards" if done else "to do"
    if 0 < done < shards:
        state += f", {shards - done} missing"
    whole = size(store.bytes) + ("" if done else f" in {counted(shards, 'shard')}")
    where = "" if store.address is None else f", in {store.address}"
    return (
        f"{split:<12} {about}{store.positions:,} positions in "
        f"{store.sequences:,} sequences at {width}: {whole}, {state}{where}"
    )


def _students(plan: Plan) -> list[str]:
    lines = []
    for name, student in plan.students.items():
        parameters = student.parameters
        lines.append(
            f"student      {name}: "
            f"{'' if parameters is None else f'{parameters:,} parameters, '}{student.steps:,} "
            f"steps of {student.tokens // student.steps:,} tokens, "
            f"{'trained' if student.done else 'to do'}"
        )
        if student.note is not None:
            lines.append(f"note         {student.note}")
        if student.slowdown is not None and not student.done:
            lines.append(
                f"note         students.{name}.quantize: a step that rounds takes about "
                f"{student.slowdown:.2f} times as long on a CPU"
            )
        if student.not_exported_to:
            lines.append(
                f"note         students.{name}: a student of this family cannot be exported to "
                f"{', '.join(student.not_exported_to)}"
            )
    return lines


def _own_tokens(plan: Plan) -> list[str]:
    """Stores that are written in the tokens of students."""
    lines = []
    for own in plan.tokens:
        for split, store in own.stores.items():
            lines.append(f"{_store('tokens', store)} ({split}, for {' and '.join(own.students)})")
        if own.hours:
            lines.append(f"note         tokens: {duration(3600 * own.hours)} to write")
        if own.note is not None:
            lines.append(f"note         {own.note}")
    return lines


def _own_text(plan: Plan) -> list[str]:
    """Texts that students with rounds write."""
    lines = []
    for name, rounds in plan.rounds.items():
        for text in rounds.texts:
            most = "" if text.counted else "at most "
            left = "done" if not text.positions_missing else "to score"
            state = left if text.counted else "to write"
            lines.append(
                f"text         {name}, after training {text.round} ({text.split}): {most}"
                f"{text.prompts:,} answers of {text.positions:,} tokens in all, "
                f"{most}{size(text.bytes)} of scores, {state}"
            )
    return lines


def _stages(plan: Plan) -> list[str]:
    lines = []
    for stage, needed in plan.memory.items():
        if needed is None:
            taken = "unknown, its model is not on this machine"
        else:
            taken = f"about {size(needed)}"
        hours = plan.hours[stage]
        left = f"; {duration(3600 * hours)} to go" if hours else ""
        if left and stage == "teacher-logits":
            left += f" at {plan.tokens_per_second:,.0f} tokens/s"
        lines.append(f"memory       {stage}: {taken}{left}")
    return lines


def _captures(plan: Plan) -> list[str]:

    def row(
        capture: tuple[int, int, str], width: float, measured: str | None, count: int, note: str
    ) -> list[str]:
        about = "" if measured else "~"
        return [*map(str, capture), f"{about}{width:g}", size(count), note]

    own = plan.stores["train"]
    capture = (plan.capture["head"], plan.capture["tail"], plan.codec)
    rows = [
        ["head", "tail", "codec", "bytes/position", "in all", ""],
        row(capture, own.bytes_per_position, own.measured, own.bytes, "this recipe"),
        *[
            row((each.head, each.tail, each.codec), each.bytes_per_position, each.measured,
                each.bytes, "")
            for each in plan.alternatives
        ],
    ]  # fmt: skip
    heading, *lines = [f"{' ' * 13}{line}" for line in _aligned(rows)]
    return [f"kept{heading[4:]}", *lines]


def _disk(plan: Plan) -> str:
    """Bytes still to be written on this machine."""
    stores = plan.stores.values()
    here = [store.bytes_missing for store in stores if store.address is None]
    remote = sum(store.bytes for store in stores if store.address is not None)
    needed, what = sum(here), ["no store", "one store", "both stores"][len(here)]
    for count, named in (
        (sum(s.bytes_missing for own in plan.tokens for s in own.stores.values()), "tokens"),
        (sum(t.bytes_missing for one in plan.rounds.values() for t in one.texts), "own text"),
    ):
        if count:
            needed, what = needed + count, f"{what}, {named}"
    if len(here) < len(stores):
        needed += min(remote, plan.cache_bytes)
        what = f"{what} and the cache of the other" if here else "the cache"
    enough = "" if needed <= plan.free_bytes else ": not enough"
    more = f"{size(needed)} more for {what}" if needed else "nothing more to write"
    return f"disk         {more}, {size(plan.free_bytes)} free{enough}"


def pilot_text(pilot: PilotRecord, own: PilotRow, store: StoreSize, sequence_length: int) -> str:
    """The figures of a pilot.

    own    the row of the recipe's own capture
    store  the store that the recipe will make
    """
    seconds = store.sequences * sequence_length / pilot.tokens_per_second
    masses = [f"{mass:.3f}" for mass in pilot.covered_mass.values()]
    names = ("head", "tail", "codec", "bytes/position", "in all", "KL", "angle", "length", "error")
    rows = [
        [*names, ""],
        *[
            [
                str(row.head),
                str(row.tail),
                row.codec_name,
                f"{row.bytes_per_position:.1f}",
                size(store.positions * row.bytes_per_position),
                f"{row.kl:.5f}",
                f"{row.angle:.2f}\u00b0",
                f"{row.norm_ratio:.3f}",
                f"{row.gradient_error:.3f}",
                "this recipe" if row is own else "",
            ]
            for row in pilot.captures
        ],
    ]
    return "\n".join(
        [
            f"pilot        {pilot.sequences:,} sequences, {pilot.positions:,} positions, "
            f"{pilot.tokens_per_second:,.0f} tokens/s ({pilot.machine})",
            f"whole        {store.sequences:,} sequences, {store.positions:,} positions, "
            f"{duration(seconds)}",
            "",
            "mean probability inside the head",
            *_aligned([["head", *pilot.covered_mass], ["mass", *masses]]),
            "",
            "gradient of each capture, compared with that of the whole distribution",
            *_aligned(rows),
        ]
    )


def recommendation_text(
    choice: PilotRow | None, own: PilotRow, pilot: PilotRecord, budget: float | None
) -> str:
    """The recommended capture; its last line goes into the recipe.

    choice  the recommended row; None if no capture fits the budget
    """
    if choice is None:
        least = pilot.smallest(own)
        return (
            f"no measured capture fits into {budget:g} bytes per position; the smallest takes "
            f"{least.bytes_per_position:g} (head = {least.head}, tail = {least.tail})"
        )
    most = own.bytes_per_position if budget is None else budget
    line = f"head = {choice.head}, tail = {choice.tail}"
    if choice is own:
        return f"best within {most:.4g} bytes per position: the recipe's own capture\n{line}"
    return (
        f"best within {most:.4g} bytes per position: {choice.bytes_per_position:.1f} bytes, "
        f"gradient error {choice.gradient_error:.3f} (the recipe has "
        f"{own.bytes_per_position:.1f} and {own.gradient_error:.3f}); in [logits]:\n{line}"
    )
