"""The page that goes with a student: what is known of it, from the run's own records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.manifest import Manifest

_FRONT = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- coldstill
- distillation
---
"""
_FIGURES = (
    ("loss", "held-out loss, nats", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl", "KL(teacher, model), nats", "{:.4f}"),
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
    """Of the store that it was trained from, if that is still there."""
    settings: Mapping[str, Any]
    """`student.json`."""
    evaluation: Mapping[str, Any] | None
    """`evaluation.json`,"""
    teacher: Mapping[str, Any] | None
    """and the teacher's."""


def model_card(name: str, family: str, parameters: int, facts: Facts) -> str:
    """A README in Markdown, with the lines that model hubs read in front."""
    rows = [("model", f"`{family}`, {parameters:,} parameters"), *_origin(facts)]
    parts = [
        _FRONT,
        f"# {name}\n",
        "A language model distilled offline with coldstill: it was trained from what its teacher "
        "had said about a corpus once, and never met it.\n",
        "## How it was made\n",
        _table(("", ""), rows),
        "## What was measured\n",
        _measured(facts),
        "## Loading it\n",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this page lies\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n",
    ]
    return "\n".join(parts)


def _origin(facts: Facts) -> list[tuple[str, str]]:
    rows = []
    if facts.manifest is not None:
        rows += _of_store(facts.manifest)
    student = facts.settings.get("student", {})
    ways = ("architecture", "model", "layers", "prune")
    begun = next((key for key in ways if student.get(key)), None)
    if begun is not None:
        rows.append(("begun as", f"{begun}: {_short(student[begun])}"))
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
        (
            "teacher",
            f"{teacher.name} (`{teacher.family}`, {teacher.parameters:,} parameters, "
            f"{teacher.dtype}), SHA-256 `{teacher.fingerprint}`",
        ),
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
