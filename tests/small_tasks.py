"""Task files with their data, and a model's results computed by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from conftest import WORDS

if TYPE_CHECKING:
    from pathlib import Path


DATA = {"dataset_path": "json", "test_split": "test"}


def quiz(count: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with three answers of different lengths."""
    random = np.random.default_rng(seed)
    return [
        {
            "question": " ".join(random.choice(WORDS, 4)),
            "answers": [" ".join(random.choice(WORDS, n)) for n in (1, 2, 3)],
            "right": int(random.integers(3)),
        }
        for _ in range(count)
    ]


QUIZ: dict[str, Any] = {
    **DATA,
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{answers}}",
    "doc_to_target": "right",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
}
PROSE: dict[str, Any] = {
    **DATA,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}
LAST: dict[str, Any] = {
    **DATA,
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{answers[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    ],
}
WRITE: dict[str, Any] = {
    **DATA,
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(
    folder: Path, name: str, task: dict[str, Any], rows: list[dict[str, Any]] | None = None
) -> Path:
    """Write a task file (JSON is YAML) and its data beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        task = {**task, "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"task": name, **task}), encoding="utf-8")
    return path


@torch.no_grad()
def logprob(model: Any, tokenizer: Any, before: str, after: str, size: int) -> float:
    """Log-probability of `after` given `before`, over the first `size` rows of the vocabulary.

    An empty `before` is the end of text.
    """
    whole = tokenizer(before + after)["input_ids"]
    if before:
        start = len(tokenizer(before)["input_ids"])
    else:
        whole, start = [tokenizer.eos_token_id, *whole], 1
    logits = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0, :, :size]
    logprobs = logits.double().log_softmax(-1)
    return sum(float(logprobs[i - 1, whole[i]]) for i in range(start, len(whole)))


@torch.no_grad()
def written(model: Any, tokenizer: Any, prompt: str, count: int, size: int) -> str:
    """The greedy continuation of a prompt, up to the end of the line."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :size]
        ids = [*ids, int(logits.argmax())]
        if ids[-1] == tokenizer.eos_token_id:
            break
    text: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text.split("\n")[0]
