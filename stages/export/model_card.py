"""The page that goes with a student: what is known of it, from the run's own records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.store.manifest import Manifest, TeacherIdentity
    from .contract import Format

_FRONT = """\
---
library_name: {library}
pipeline_tag: text-generation
tags:
- coldstill
- distillation
---
"""
_FIGURES = (
    ("loss", "held-out loss, nats", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl", "KL(teacher, model), nats", "{:z.4f}"),
    ("agreement", "same most probable token as the teacher", "{:.1%}"),
    ("accuracy", "most probable token is the next one", "{:.1%}"),
    ("acceptance", "acceptance in speculative decoding", "{:.1%}"),
    ("ece", "calibration error", "{:.1%}"),
)
_APART = {
    "positions": "packed together, kept apart by position ids",
    "mask": "packed together, kept apart by an attention mask",
    "single": "one to a sequence",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the run has written down."""

    version: str
    """Of coldstill."""
    manifest: Manifest | None
    """Of the store that it was trained from, if that is still there;"""
    heldout: Manifest
    """of the held-out store, by the same teacher from the same corpus."""
    settings: Mapping[str, Any]
    """`student.json`."""
    evaluation: Mapping[str, Any] | None
    """`evaluation.json`,"""
    teacher: Mapping[str, Any] | None
    """and the teacher's."""


def model_card(name: str, model: Any, form: Format, facts: Facts, record: Mapping[str, Any]) -> str:
    """A README in Markdown, with the lines that model hubs read in front.

    model   the student
    form    what it was written in
    record  what is known of that: `export.json`, but for its files
    """
    family, parameters = model.config.model_type, model.num_parameters()
    rows = [("model", f"`{family}`, {parameters:,} parameters"), *_origin(facts)]
    parts = [
        _FRONT.format(library=form.library),
        f"# {name}\n",
        "A language model distilled offline with coldstill: it was trained from what its teacher "
        "had said about a corpus once, and never met it.\n",
        "## How it was made\n",
        _table(("", ""), rows),
        "## What was measured\n",
        _measured(facts),
        "## These files\n",
        _table(("", ""), files_rows(record)),
        "## Loading it\n",
        form.usage(name),
    ]
    return "\n".join(parts)


def _origin(facts: Facts) -> list[tuple[str, str]]:
    rows = []
    if facts.manifest is not None:
        rows += _of_store(facts.manifest)
    else:
        rows += _of_heldout(facts.heldout)
    student = facts.settings.get("student", {})
    ways = ("architecture", "model", "layers", "prune")
    begun = next((key for key in ways if student.get(key)), None)
    if begun is not None:
        rows.append(("begun as", _beginning(begun, student[begun])))
    if student.get("lora"):
        rows.append(("adapters", _short(student["lora"])))
    if student.get("teachers"):
        rows.append(("further teachers", _short(student["teachers"])))
    rows.append(("objective", _short(student.get("objective", {}))))
    rows.append(("training", _short(student.get("train", {}))))
    rows.append(("seed", str(facts.settings.get("seed"))))
    rows.append(("made with", f"coldstill {facts.version}"))
    return rows


def _of_store(manifest: Manifest) -> list[tuple[str, str]]:
    teacher, corpus, packing, capture = (
        manifest.teacher,
        manifest.corpus,
        manifest.packing,
        manifest.capture,
    )
    kept = f"head {capture.head}, tail {capture.tail} a position"
    if capture.temperatures:
        kept += f", exact at the temperatures {', '.join(map(str, capture.temperatures))} too"
    rows = [
        _teacher(teacher),
        ("corpus", f"{corpus.documents:,} documents, SHA-256 `{corpus.fingerprint}`"),
        (
            "sequences",
            f"{manifest.sequences:,} of up to {packing.sequence_length:,} tokens; documents "
            f"{_APART[packing.isolation]}; SHA-256 `{packing.fingerprint}`",
        ),
        ("capture", f"{kept}; codec {manifest.codec['name']}, seed {capture.seed}"),
    ]
    if manifest.generated is not None:
        answers = manifest.generated
        rows.append(
            (
                "text",
                f"the teacher's own answers: temperature {answers.temperature:g}, top_p "
                f"{answers.top_p:g}, top_k {answers.top_k}",
            )
        )
    return rows


def _of_heldout(manifest: Manifest) -> list[tuple[str, str]]:
    """What is known where the store that it was trained from is gone: that of the held-out one."""
    return [
        _teacher(manifest.teacher),
        ("corpus", f"held-out documents with the SHA-256 `{manifest.corpus.fingerprint}`"),
        ("capture", "no longer here"),
    ]


def _teacher(teacher: TeacherIdentity) -> tuple[str, str]:
    return (
        "teacher",
        f"{teacher.name} (`{teacher.family}`, {teacher.parameters:,} parameters, "
        f"{teacher.dtype}), SHA-256 `{teacher.fingerprint}`",
    )


def _beginning(way: str, value: Any) -> str:
    """What a student began as, in words."""
    if way == "prune":
        cuts = [value] if isinstance(value, dict) else list(value)
        return "the teacher, pruned to " + ", then to ".join(_cut(cut) for cut in cuts)
    if way == "layers":
        return f"layers of the teacher: {_short(value)}"
    if way == "model":
        return str(value)
    return f"random weights: {_short(value)}"


def _cut(cut: Mapping[str, Any]) -> str:
    """One round of pruning."""
    names = {
        "layers": "layers",
        "hidden": "hidden channels",
        "feed_forward": "feed-forward neurons",
        "heads": "heads",
        "kv_heads": "key-value heads",
    }
    said = [f"{cut[key]:,} {title}" for key, title in names.items() if cut.get(key)]
    budget = cut.get("parameters")
    if isinstance(budget, int):
        said.append(f"at most {budget:,} parameters")
    elif budget:
        said.append(f"at most {budget} of its parameters")
    return " and ".join(said)


def files_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of the files that a page goes with."""
    check, costs = record["check"], record["costs"]
    rows = [
        ("format", record["format"]),
        ("size", f"{costs['bytes'] / 1e6:,.1f} MB"),
        ("checked against the student", _check(record["checked_by"], check)),
    ]
    base = record["base"]
    if base is not None:
        said = _check(base["checked_by"], base["check"])
        rows.append((f"before it was quantised ({base['format']})", said))
    rows += [("note", note) for note in record["notes"]]
    for speed in costs["generation"][:1]:
        rows.append(
            (
                "speed, one text at a time",
                f"prompts {speed['prefill_tokens_per_second']:,.0f} tokens/s, then "
                f"{1e3 * speed['token_seconds']:.2f} ms a token ({costs['machine']})",
            )
        )
    return rows


def _check(by: str, check: Mapping[str, Any]) -> str:
    return (
        f"by {by} on {check['positions']:,} held-out positions: largest difference of two "
        f"log-probabilities {check['largest_difference']:.2g}, KL {check['kl']:.2g} nats, same "
        f"most probable token {check['agreement']:.2%}"
    )


def _measured(facts: Facts) -> str:
    model, teacher = facts.evaluation, facts.teacher
    if model is None:
        return "Nothing yet.\n"
    rows = [
        (
            title,
            form.format(model[key]),
            form.format(teacher[key]) if teacher is not None and key in teacher else "",
        )
        for key, title, form in _FIGURES
        if key in model
    ]
    return (
        f"On {model['positions']:,} positions of held-out documents of the same corpus:\n\n"
        + _table(("", "this model", "its teacher"), rows)
    )


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    # a bar would end its cell
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _short(value: Any) -> str:
    """A setting without what is off, in the words of the recipe."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else json.dumps(value)
    said = {key: inner for key, inner in value.items() if inner not in (None, 0, False, {}, [])}
    return ", ".join(f"{key} = {_short(inner)}" for key, inner in said.items())
