"""The two tables of models on a page: how good each is, and what it costs to run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...results.caveats import heldout_groups, machine_groups, missing, notes
from ...results.columns import COST, QUALITY, groups_of, short_name
from ...results.table import COST_TITLE
from ..charts import Markup, element, joined, swatch
from .plot import looks, outlines, students_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...results.columns import Column, Row

_QUALITY = (
    "On held-out text. Bold: the best student of each column, where figures compare and differ. "
    "Cached: the bytes a position of the stores a student was trained from. Loss is the mean of "
    "-log q(next token) in nats, perplexity its exponential, bits/byte the same loss for each byte "
    "of text. KL (from teacher to model, in nats), agreement (same most probable token) and "
    "acceptance (share of tokens that speculative decoding would accept) compare with the teacher; "
    "ECE is the calibration error."
)
_COST = (
    "Size is that of the weights on disk, FLOPs those of a token. Of one text (batch 1): tokens of "
    "a prompt read in a second, time to the first token, median and 95th percentile of each "
    "further one, and the most memory, weights included. Of eight texts at once (batch 8): time of "
    "a step, and tokens a second in all; exports are timed with one."
)


def figures_section(rows: Sequence[Row]) -> Markup:
    """Both tables with what must be known of them."""
    machines = "; ".join(machine_groups(rows))
    where = f" Measured on {machines}." if machines else ""
    return element(
        "section",
        element("h2", "Figures"),
        *_table(QUALITY, rows, "Quality of all models", _QUALITY),
        element("h2", COST_TITLE),
        *_table(
            COST,
            rows,
            "Cost of all models",
            " ".join([_COST + where, *notes(rows), *missing(rows)]),
        ),
        cls="whole figures",
    )


def _table(
    columns: tuple[Column, ...], rows: Sequence[Row], label: str, caption: str
) -> tuple[Markup, Markup]:
    """A table that scrolls by itself where it is wider than the page, and its caption."""
    inside = figures_table(columns, rows)
    box = element("div", inside, cls="scroll", role="region", aria_label=label, tabindex="0")
    return box, element("p", caption, cls="caption")


def figures_table(columns: tuple[Column, ...], rows: Sequence[Row]) -> Markup:
    """These figures of all models, the best students marked; exports below their students."""
    marked, look, outline = best(columns, rows), looks(rows), outlines(rows)
    body = []
    for number, row in enumerate(rows):
        name = row["name"]
        sample = swatch(look[name], 0, 7, line=False, marks=True, hollow=outline[name])
        picture = element("svg", sample, cls="chart", width=22, height=14, aria_hidden="true")
        line = [element("th", picture, element("bdi", short_name(row)), scope="row")]
        for column in columns[1:]:
            figure = column.cell(row)
            is_best = (number, column.key) in marked
            line.append(element("td", element("strong", figure) if is_best else figure))
        body.append(element("tr", *line, cls="export" if row["role"] == "export" else None))
    return element("table", element("thead", *_head(columns)), element("tbody", *body))


def _head(columns: tuple[Column, ...]) -> list[Markup]:
    """The titles, below the names of groups where there are any."""
    titles = element("tr", *(element("th", one.title, scope="col") for one in columns))
    groups = groups_of(columns)
    if len(groups) == 1:
        return [titles]
    cells = (
        element("th", name, colspan=count, scope="colgroup", cls="group")
        if name
        else element("td", joined(), colspan=count)
        for name, count in groups
    )
    return [element("tr", *cells), titles]


def best(columns: tuple[Column, ...], rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Row number and key of the best figure of every column, among students; all that read alike.

    Nothing is marked where all are alike, nor where figures do not compare: those of different
    held-out stores, and speed and memory of different machines. Exports are never marked: what they
    win is their format's.
    """
    students = [number for number, row in enumerate(rows) if row["role"] == "student"]
    own = students_of(rows)
    compare = {
        "model": True,
        "text": len(heldout_groups(rows)) < 2,
        "machine": len(machine_groups(own)) < 2,
    }
    found: set[tuple[int, str]] = set()
    for column in columns:
        if not column.better or not compare[column.of]:
            continue
        values = {n: value for n in students if (value := column.value(rows[n])) is not None}
        texts = {n: column.told(value) for n, value in values.items()}
        if len(set(texts.values())) > 1:
            pick = min if column.better == "less" else max
            first = pick(values, key=lambda n: values[n])
            found |= {(n, column.key) for n in values if texts[n] == texts[first]}
    return found
