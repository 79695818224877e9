"""The model card of an export: a README with what the run's records state about the student."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.store.manifest import Manifest
    from .contract import Format
    from .record import Check, ExportRecord

_TEMPLATE = Path(__file__).with_name("model_card.jinja")
_FIGURES = (
    ("loss", "held-out loss, nats", "{:.4f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl", "KL(teacher, model), nats", "{:z.4f}"),
    ("agreement", "same most probable token as the teacher", "{:.1%}"),
    ("accuracy", "most probable token is the next one", "{:.1%}"),
    ("acceptance", "acceptance in speculative decoding", "{:.1%}"),
    ("ece", "calibration error", "{:.1%}"),
)
_ISOLATION = {
    "positions": "packed together, separated by position ids",
    "mask": "packed together, separated by an attention mask",
    "single": "one in each sequence",
}
_CUTS = {
    "layers": "layers",
    "hidden": "hidden channels",
    "feed_forward": "feed-forward neurons",
    "heads": "heads",
    "kv_heads": "key-value heads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The records of a run about a student."""

    version: str
    """Version of coldstill."""
    manifest: Manifest | None
    """Manifest of the store that it was trained from; None if that is gone."""
    heldout: Manifest
    """Manifest of the held-out store, from the same teacher and corpus."""
    settings: Mapping[str, Any]
    """Content of `student.json`."""
    evaluation: Mapping[str, Any] | None
    """Figures of the student, by name; None if it was not measured."""
    teacher: Mapping[str, Any] | None
    """Figures of the teacher, by name; None if it was not measured."""


def model_card(name: str, model: Any, form: Format, facts: Facts, record: ExportRecord) -> str:
    """A README in Markdown, with the metadata that model hubs read at its top.

    name    name of the student
    model   the student
    form    format of the export
    """
    from huggingface_hub import ModelCard, ModelCardData

    family, parameters = model.config.model_type, model.num_parameters()
    origin = [("model", f"`{family}`, {parameters:,} parameters"), *_origin(facts)]
    ours, theirs = facts.evaluation or {}, facts.teacher or {}
    card = ModelCard.from_template(
        ModelCardData(
            library_name=form.library,
            pipeline_tag="text-generation",
            tags=["coldstill", "distillation"],
        ),
        template_path=str(_TEMPLATE),
        name=_cell(name),
        origin=[(title, _cell(text)) for title, text in origin],
        positions=ours.get("positions"),
        figures=[
            (title, form.format(ours[key]), _known(form, theirs.get(key)))
            for key, title, form in _FIGURES
            if ours.get(key) is not None
        ],
        files=[(title, _cell(text)) for title, text in _files(record)],
        usage=form.usage(name),
    )
    return str(card)


def _known(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _cell(text: str) -> str:
    """Text of any origin as the content of a table cell: one line, without HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")


def _origin(facts: Facts) -> list[tuple[str, str]]:
    teacher = facts.heldout.teacher
    rows = [
        (
            "teacher",
            f"{teacher.name} (`{teacher.family}`, {teacher.parameters:,} parameters, "
            f"{teacher.dtype}), SHA-256 `{teacher.fingerprint}`",
        )
    ]
    if facts.manifest is not None:
        rows += _data(facts.manifest)
    else:
        heldout = f"held-out documents with the SHA-256 `{facts.heldout.corpus.fingerprint}`"
        rows += [("corpus", heldout), ("capture", "no longer here")]
    student = facts.settings.get("student", {})
    ways = ("architecture", "model", "layers", "prune")
    begun = next((key for key in ways if student.get(key)), None)
    if begun is not None:
        rows.append(("initial weights", _initial_weights(begun, student[begun])))
    if student.get("lora"):
        rows.append(("adapters", _short(student["lora"])))
    if student.get("quantize"):
        rows.append(("trained with rounded weights", _short(student["quantize"])))
    if student.get("teachers"):
        rows.append(("further teachers", _short(student["teachers"])))
    if student.get("rounds"):
        rows.append(("rounds on its own text", _short(student["rounds"])))
    return [
        *rows,
        ("objective", _short(student.get("objective", {}))),
        ("training", _short(student.get("train", {}))),
        ("seed", str(facts.settings.get("seed"))),
        ("made with", f"coldstill {facts.version}"),
    ]


def _data(manifest: Manifest) -> list[tuple[str, str]]:
    corpus, packing, capture = manifest.corpus, manifest.packing, manifest.capture
    kept = f"head {capture.head}, tail {capture.tail} per position"
    if capture.temperatures:
        kept += f", also exact at the temperatures {', '.join(map(str, capture.temperatures))}"
    rows = [
        ("corpus", f"{corpus.documents:,} documents, SHA-256 `{corpus.fingerprint}`"),
        (
            "sequences",
            f"{manifest.sequences:,} of up to {packing.sequence_length:,} tokens; documents "
            f"{_ISOLATION[packing.isolation]}; SHA-256 `{packing.fingerprint}`",
        ),
        ("capture", f"{kept}; codec {manifest.codec['name']}, seed {capture.seed}"),
    ]
    if (answers := manifest.generated) is not None:
        settings = f"temperature {answers.temperature:g}, top_p {answers.top_p:g}, top_k "
        rows.append(("text", f"the teacher's own answers: {settings}{answers.top_k}"))
    return rows


def _initial_weights(way: str, value: Any) -> str:
    if way == "prune":
        rounds = [value] if isinstance(value, dict) else list(value)
        return "the teacher, pruned to " + ", then to ".join(_cut(cut) for cut in rounds)
    if way == "layers":
        return f"layers of the teacher: {_short(value)}"
    return str(value) if way == "model" else f"random: {_short(value)}"


def _cut(cut: Mapping[str, Any]) -> str:
    sizes = [f"{cut[key]:,} {title}" for key, title in _CUTS.items() if cut.get(key)]
    if budget := cut.get("parameters"):
        most = f"{budget:,}" if isinstance(budget, int) else f"{budget} of its"
        sizes.append(f"at most {most} parameters")
    return " and ".join(sizes)


def _files(record: ExportRecord) -> list[tuple[str, str]]:
    rows = [
        ("format", record.format),
        ("size", f"{record.costs.bytes / 1e6:,.1f} MB"),
        ("checked against the student", _check(record)),
    ]
    if record.base is not None:
        rows.append((f"before it was quantised ({record.base.format})", _check(record.base)))
    rows += [("note", note) for note in record.notes]
    for speed in record.costs.generation[:1]:
        text = (
            f"prompts {speed.prefill_tokens_per_second:,.0f} tokens/s, then "
            f"{1e3 * speed.token_seconds:.2f} ms a token ({record.costs.machine})"
        )
        rows.append(("speed, one text at a time", text))
    return rows


def _check(check: Check) -> str:
    found = check.check
    return (
        f"by {check.checked_by} on {found.positions:,} held-out positions: largest difference of "
        f"two log-probabilities {found.largest_difference:.2g}, KL {found.kl:.2g} nats, same most "
        f"probable token {found.agreement:.2%}"
    )


def _short(value: Any) -> str:
    """A setting as in the recipe, without the parts that are off."""
    if not isinstance(value, dict):
        return value if isinstance(value, str) else json.dumps(value)
    on = {key: inner for key, inner in value.items() if inner not in (None, 0, False, {}, [])}
    return ", ".join(f"{key} = {_short(inner)}" for key, inner in on.items())
