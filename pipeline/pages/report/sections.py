"""The parts of the page that are words and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...units import size
from ..charts import Markup, element, joined
from ..compare.page import section
from ..inspect.store import counted, settings_in_words
from ..inspect.tokens import legible
from .pictures import covered_mass, entropies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Facts = dict[str, Any]
_MOST = 6
"""Students that are told of one by one; the table has them all."""


def lineage(facts: Mapping[str, Any]) -> Markup:
    """What was distilled from what, from left to right."""
    return joined(
        _card("Teacher", _teacher(facts["teacher"]), "first"),
        _card("Corpus", _corpus(facts["corpus"]), "plus"),
        _card("Record", _capture(facts), "then"),
        element(
            "div", element("h3", _students_title(facts)), _students(facts), cls="card then"
        ),
    )  # fmt: skip


def _card(title: str, lines: Sequence[tuple[str, str]], kind: str) -> Markup:
    return element("div", element("h3", title), definitions(lines), cls=f"card {kind}")


def definitions(lines: Sequence[tuple[str, str]]) -> Markup:
    """Names and what they are, those that are anything."""
    shown = [(name, value) for name, value in lines if value]
    return element("dl", *(part for n, v in shown for part in (element("dt", n), element("dd", v))))


def _teacher(teacher: Facts) -> list[tuple[str, str]]:
    if "name" not in teacher:
        return [("origin", teacher["origin"]), ("", "")]
    return [
        ("name", teacher["name"]),
        ("family", f"{teacher['family']}, {teacher['dtype']}"),
        ("size", f"{teacher['parameters']:,} parameters"),
        ("origin", teacher["origin"]),
        ("fingerprint", teacher["fingerprint"][:12]),
    ]


def _corpus(corpus: Facts) -> list[tuple[str, str]]:
    files = ", ".join(corpus["files"])
    if "sources" in corpus:
        files += f" ({counted(corpus['sources'], 'file')})"
    train = corpus["splits"].get("train", {})
    held = corpus["splits"].get("heldout", {})
    documents = corpus.get("documents")
    lines = [("files", files)]
    if documents is None:
        lines += [
            ("documents", f"{d['documents']:,} ({split})") for split, d in corpus["splits"].items()
        ]
    else:
        lines += [
            ("documents", f"{documents:,}, {corpus['heldout_share']:.1%} of them held out"),
            ("tokens", f"{train['tokens']:,}, and {held['tokens']:,} held out"),
            ("learned", _share(corpus["supervised_share"])),
        ]
    return [*lines, ("fingerprint", (train or held).get("fingerprint", "")[:12])]


def _share(share: float | None) -> str:
    return "the teacher's answers" if share is None else f"{share:.1%} of all tokens"


def _capture(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    record = facts["record"]
    if record is None:
        return [("not here", facts["no_record"])]
    capture = record["capture"]
    temperatures = ", ".join(f"{t:g}" for t in (1.0, *capture["temperatures"]))
    return [
        ("head", _or_none(capture["head"], "most probable token")),
        ("tail", _or_none(capture["tail"], "sample")),
        ("temperatures" if capture["temperatures"] else "temperature", temperatures),
        ("codec", record["codec"]["name"]),
        ("store", record["store"]["name"]),
        ("holds", f"{counted(record['sequences'], 'sequence')} in {size(record['bytes'])}"),
    ]


def _or_none(count: int, what: str) -> str:
    return counted(count, what) if count else "none"


def _students_title(facts: Mapping[str, Any]) -> str:
    count = len(facts["students"])
    return "Student" if count == 1 else f"{count} students"


def _students(facts: Mapping[str, Any]) -> Markup:
    students = facts["students"]
    named = {facts["best"], facts["baseline"]}
    # the two that the result speaks of are always among them
    first = [one for one in students if one["name"] in named]
    others = [one for one in students if one["name"] not in named]
    shown = [*first, *others[: max(0, _MOST - len(first))]]
    items = [_student(one, facts) for one in students if one in shown]
    if len(students) > len(shown):
        items.append(element("li", f"and {len(students) - len(shown)} more", cls="more"))
    return element("ul", *items)


def _student(one: Facts, facts: Mapping[str, Any]) -> Markup:
    alone = sum(other["listens"] is False for other in facts["students"]) == 1
    kind = "no teacher" if one["listens"] is False else ""
    if one["name"] == facts["baseline"] and not alone:
        kind = "no teacher, the baseline"
    if not one["evaluated"]:
        kind = f"{kind}, not evaluated".strip(", ")
    steps = (one.get("train") or {}).get("steps")
    objective = one.get("objective")
    also = [f"also {part}" for part in one.get("teachers", [])]
    told = [
        one["origin"],
        ", ".join([f"objective {objective}" if objective else "", *also]).strip(", "),
        counted(steps, "step") if isinstance(steps, int) else "",
    ]
    name = element("b", element("bdi", one["name"]))
    label = element("small", kind) if kind else joined()
    return element("li", name, " ", label, element("p", "; ".join(part for part in told if part)))


def record_sections(facts: Mapping[str, Any]) -> list[Markup]:
    """The cache in numbers, and what its record says of the teacher."""
    record, title = facts["record"], element("h2", "The teacher's cache in numbers")
    if record is None or not record["positions"]:
        why = facts["no_record"] or "it holds no position yet"
        return [
            element("section", title, element("p", f"Not told: {why}.", cls="none"), cls="whole")
        ]
    plots = [entropies(record), *([covered_mass(record)] if record["capture"]["head"] else [])]
    # beside a lone picture, or above two
    width = "half" if len(plots) == 1 else "whole"
    numbers = definitions(_numbers(record, facts["heldout"]))
    return [element("section", title, numbers, cls=width), *(section(plot) for plot in plots)]


def _numbers(record: Facts, heldout: Facts | None) -> list[tuple[str, str]]:
    gaps = record["shards"] - record["shards_done"]
    where = f"in {counted(record['sequences'], 'sequence')}"
    missing = f"; {gaps} of {record['shards']} shards missing" if gaps else ""
    full, stored = record["full_logits_bytes"], record["bytes"]
    lossless = not record["error"]["maximum"]
    codec = "nothing: every number is as it was captured"
    held = f"{record['head_mass']:.1%} of the probability"
    said = f"loss {record['teacher_loss']:.4f}, entropy {record['teacher_entropy']:.4f} nats"
    return [
        ("positions", f"{record['positions']:,} {where}{missing}"),
        ("a position", f"{record['bytes_per_position']:.1f} bytes, tokens included"),
        ("in all", size(stored)),
        (
            "full logits",
            f"{size(full)} at 16 bits each, {full / max(1, stored):,.0f} times as much",
        ),
        ("codec", settings_in_words(record["codec"])),
        ("codec costs", codec if lossless else f"KL {record['codec_kl']:.2g} nats a position"),
        ("head holds", held if record["capture"]["head"] else ""),
        ("teacher", said),
        *_speed(record["measurements"]),
        ("held out", _heldout(heldout)),
    ]


def _speed(measured: Facts) -> list[tuple[str, str]]:
    speed = measured.get("capture_tokens_per_second")
    memory = measured.get("capture_peak_memory_bytes")
    return [
        ("captured at", f"{speed:,.0f} tokens/s" if _is_number(speed) else ""),
        ("peak memory", size(memory) if _is_number(memory) and memory else ""),
        ("machine", str(measured.get("machine") or "")),
    ]


def _heldout(heldout: Facts | None) -> str:
    if heldout is None:
        return ""
    kept = f"head {heldout['head']:,}, tail {heldout['tail']:,}"
    return f"{heldout['positions']:,} more positions to measure on ({kept})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def again_section(facts: Mapping[str, Any]) -> Markup:
    """How to make it again."""
    again = facts["reproduce"]
    made = again["environment"]
    versions = [f"{name} {made[name]}" for name in sorted(made) if name not in ("platform",)]
    lines = [
        ("run", facts["run"]),
        ("machine", "; ".join(again["machines"])),
        ("platform", made.get("platform", "")),
        ("versions", ", ".join(versions)),
    ]
    notes = []
    if again["recipe"] is not None and again["settings"] is None:
        notes.append(
            "What is set beside this file cannot be said on the command line; "
            "recipe.resolved.json in the run has every setting."
        )
    commands = element("pre", _plain("\n".join(again["commands"])), tabindex="0")
    recipe = joined() if again["recipe"] is None else joined(
        element("h3", "recipe.toml"), element("pre", _plain(again["recipe"]), tabindex="0")
    )  # fmt: skip
    return element(
        "section",
        element("h2", "How to make it again"),
        commands,
        *(element("p", note, cls="caption") for note in notes),
        definitions(lines),
        recipe,
        cls="whole again",
    )


def _plain(text: str) -> str:
    return legible(text.replace("\r\n", "\n").encode())
