"""A small corpus and its captures, for tests of capture, training and evaluation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from coldstill.data.prepared import CorpusLayout, CorpusRecord
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.stages.capture.plan import CapturePlan, chosen_rows
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.config import CorpusConfig
from coldstill.stages.models.isolation import choose_isolation
from coldstill.stages.models.loading import (
    context_length,
    load_model,
    load_tokenizer,
    teacher_identity,
)
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.models.vocabulary import vocabulary_size
from coldstill.stages.prepare_corpus import prepare_corpus
from coldstill.stages.report import Reporter, silent
from coldstill.stages.teacher_logits import capture_split
from conftest import VOCABULARY, make_model, sentences
from transformers import AutoConfig

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Capture

LENGTH = 48
CLOCKS = ("tokens_per_second", "data_wait")
"""Training figures that depend on the clock."""


@dataclass(frozen=True, slots=True)
class SmallCorpus:
    """A prepared corpus."""

    folder: Path
    record: CorpusRecord


def prepare(folder: Path, tokenizer: Any) -> SmallCorpus:
    """Prepare texts of many lengths (some cut, most packed) and prompts, which are not learned."""
    lines = []
    for i, text in enumerate(sentences(56, seed=1)):
        half = len(text) // 2
        parts = {"prompt": text[:half], "completion": text[half:]} if i % 3 == 0 else {"text": text}
        lines.append(json.dumps(parts))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = CorpusConfig(files=("texts.jsonl",), sequence_length=LENGTH, holdout=0.3)
    record = prepare_corpus(folder / "corpus", config, folder, tokenizer, together=True)
    return SmallCorpus(folder / "corpus", record)


def save_teacher(folder: Path, tokenizer: Any, name: str = "llama", seed: int = 1) -> Path:
    """Save a confident random model; its padded rows would be even more confident."""
    model = make_model(name, VOCABULARY + 16, seed)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(3.0 if model.config.tie_word_embeddings else 6.0)
        weight[VOCABULARY:] = 10 * weight[:16]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def plan_capture(
    corpus: SmallCorpus, teacher: Path, folder: Path, capture: Capture, **changes: Any
) -> CapturePlan:
    """The plan of a capture with a saved teacher; `changes` replace fields of the plan."""
    split = changes.pop("split", "train")
    name = str(teacher)
    sequences = CorpusLayout(corpus.folder).open(split)
    plan = CapturePlan(
        split=split,
        teacher=teacher_identity(name, "teacher.model", dtype="fp32", revision="main"),
        context=context_length(AutoConfig.from_pretrained(name)),
        tokenizer=load_tokenizer(name, "teacher.model"),
        corpus=corpus.record,
        sequences=sequences,
        rows=chosen_rows(len(sequences), None, 0),
        capture=capture,
        sequence_length=LENGTH,
        shard_tokens=LENGTH * 5,
        batch_tokens=LENGTH * 2,
        codec="plain",
        store="arrow",
        folder=folder,
    )
    return dataclasses.replace(plan, **changes)


def load_teacher(teacher: Path) -> Teacher:
    """A saved teacher, ready to be captured."""
    model = load_model(str(teacher), "teacher.model", precision="fp32")
    size = vocabulary_size(load_tokenizer(str(teacher), "teacher.model"))
    return Teacher(head=connect_head(model, size), isolation=choose_isolation(model, size, LENGTH))


def capture_store(
    corpus: SmallCorpus,
    teacher: Path,
    folder: Path,
    capture: Capture,
    report: Reporter = silent,
    **changes: Any,
) -> StoreReader:
    """Capture all of a split and open the store."""
    plan = plan_capture(corpus, teacher, folder, capture, **changes)
    capture_split(plan, load_teacher(teacher), report)
    return open_store(folder)
