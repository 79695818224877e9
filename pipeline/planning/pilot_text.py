"""A pilot's figures for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..units import size
from .text import aligned, duration

if TYPE_CHECKING:
    from .sizes import StoreSize

Row = dict[str, Any]


def pilot_text(measured: Row, own: Row, store: StoreSize, sequence_length: int) -> str:
    """What was measured.

    own    the row of the recipe's own capture
    store  the one that will be made
    """
    positions = store.positions
    hours = store.sequences * sequence_length / measured["tokens_per_second"] / 3600
    masses = measured["covered_mass"]
    covered = aligned([["head", *masses], ["mass", *[f"{mass:.3f}" for mass in masses.values()]]])
    rows = [_HEADING] + [_cells(row, own, positions) for row in measured["captures"]]
    return "\n".join(
        [
            f"pilot        {measured['sequences']:,} sequences, {measured['positions']:,} "
            f"positions, {measured['tokens_per_second']:,.0f} tokens/s ({measured['machine']})",
            f"whole        {store.sequences:,} sequences, {positions:,} positions, "
            f"{duration(hours)}",
            "",
            "mean probability inside the head",
            *covered,
            "",
            "the gradient from what is kept, against that of the whole distribution",
            *[line.rstrip() for line in aligned(rows)],
        ]
    )


def recommendation_text(choice: Row | None, own: Row, measured: Row, budget: float | None) -> str:
    """What to put into the recipe; the last line is exactly that.

    choice  the row that is recommended, None if no capture fits
    """
    if choice is None:
        rows = [row for row in measured["captures"] if row["codec"] == own["codec"]]
        least = min(rows, key=lambda row: row["bytes_per_position"])
        return (
            f"none of these fits into {budget:g} bytes a position; the smallest takes "
            f"{least['bytes_per_position']:g} (head = {least['head']}, tail = {least['tail']})"
        )
    most = own["bytes_per_position"] if budget is None else budget
    line = f"head = {choice['head']}, tail = {choice['tail']}"
    if choice is own:
        return f"best within {most:.4g} bytes a position: what the recipe has\n{line}"
    return (
        f"best within {most:.4g} bytes a position: {choice['bytes_per_position']:.1f} bytes, "
        f"gradient error {choice['gradient_error']:.3f} (the recipe has "
        f"{own['bytes_per_position']:.1f} and {own['gradient_error']:.3f}); in [logits]:\n{line}"
    )


_HEADING = [
    "head",
    "tail",
    "codec",
    "bytes/position",
    "in all",
    "KL",
    "angle",
    "length",
    "error",
    "",
]


def _cells(row: Row, own: Row, positions: int) -> list[str]:
    codec = row["codec"]["name"] if isinstance(row["codec"], dict) else row["codec"]
    return [
        str(row["head"]),
        str(row["tail"]),
        codec,
        f"{row['bytes_per_position']:.1f}",
        size(positions * row["bytes_per_position"]),
        f"{row['kl']:.5f}",
        f"{row['angle']:.2f}\u00b0",
        f"{row['norm_ratio']:.3f}",
        f"{row['gradient_error']:.3f}",
        "this recipe" if row is own else "",
    ]
