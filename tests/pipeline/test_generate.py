"""A teacher that answers prompts itself: its own text, cached with its targets in one pass."""

from __future__ import annotations

import json
import shutil
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from coldstill.data.alignment import labels
from coldstill.data.prepared import CorpusLayout
from coldstill.data.store.reader import open_store
from coldstill.stages.models.loading import load_model
from compared import models_of

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk, Processes

pytest_plugins = ("desk",)

GENERATE = "generate = { max_new_tokens = 12, temperature = 0.8, top_p = 0.9 }\n"


@pytest.fixture
def asked(desk: Desk) -> Desk:
    """A desk whose corpus is prompts of many lengths, some with answers nobody asked for."""
    rows = []
    for i in range(60):
        row = {"prompt": f"{i}: " + "as the teacher likes to " * (1 + i % 3)}
        if i % 2:
            row["completion"] = "never read"
        rows.append(json.dumps(row))
    desk.write("prompts.jsonl", "\n".join(rows))
    text = (desk.root / "r.toml").read_text()
    start = text.index("files = ")
    end = text.index("\n", start)
    desk.write(
        "r.toml",
        (text[:start] + 'files = ["prompts.jsonl"]' + text[end:]).replace(
            "[logits]", f"{GENERATE}[logits]", 1
        ),
    )
    return desk


def test_answers_are_cached_with_what_the_teacher_says_of_them(
    asked: Desk, teacher_folder: Path
) -> None:
    asked.done("teacher-logits", "r.toml", "--set", "logits.codec=plain")
    store = open_store(asked.run / "logits")
    prompts = CorpusLayout(asked.run / "corpus").open("train")
    assert len(store) == len(prompts)
    assert store.manifest.generated is not None
    assert store.manifest.generated.top_p == 0.9
    block = store.read(np.arange(len(store)))
    read = prompts.read(np.arange(len(prompts)))
    model = load_model(str(teacher_folder), "teacher", precision="fp32")
    labels_M, place = labels(block.sequences), 0
    lengths = set()
    for row in range(len(store)):
        tokens, prompt = block.sequences.tokens[row], read.tokens[row]
        np.testing.assert_array_equal(tokens[: len(prompt)], prompt)
        answer = tokens[len(prompt) :]
        assert 1 <= len(answer) <= 12
        lengths.add(len(answer))
        # the answer is learned, all of it; of the prompt nothing, which costs no targets
        positions = np.arange(len(prompt) - 1, len(tokens) - 1)
        np.testing.assert_array_equal(block.sequences.positions[row], positions)
        np.testing.assert_array_equal(labels_M[place : place + len(answer)], answer)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False).logits
        logprobs = logits[0, positions, : store.manifest.tokenizer.size].log_softmax(1)
        expected = logprobs.gather(1, torch.from_numpy(answer.astype(np.int64))[:, None])[:, 0]
        ours = block.targets.label_logprob[place : place + len(answer)]
        np.testing.assert_allclose(ours, expected, atol=1e-3, rtol=1e-3)
        place += len(answer)
    assert place == len(block.targets)


def test_a_student_learns_from_the_answers(asked: Desk) -> None:
    printed = asked.done("run", "r.toml").stdout
    assert sorted(models_of(printed)) == ["baseline", "small", "teacher"]


def test_killed_in_the_middle_it_gives_the_same_answers(asked: Desk, processes: Processes) -> None:
    small = ("--set", "logits.shard_tokens=96", "--set", "logits.batch_tokens=64")
    second = asked.run / "logits" / "shards" / "00001.json"
    code, _ = processes.stopped(asked, signal.SIGKILL, second, "teacher-logits", "r.toml", *small)
    assert code == -signal.SIGKILL
    asked.done("teacher-logits", "r.toml", *small)

    def shards() -> dict[str, str]:
        return {n: digest for n, (digest, _) in asked.snapshot().items() if "/shards/" in n}

    went_on = shards()
    shutil.rmtree(asked.run)
    asked.done("teacher-logits", "r.toml", *small)
    assert shards() == went_on


def test_other_sampling_settings_make_another_store(asked: Desk) -> None:
    asked.done("teacher-logits", "r.toml")
    asked.edit("temperature = 0.8", "temperature = 0.0")
    line = asked.refused("teacher-logits", "r.toml")
    assert "made differently: generated.temperature: 0.8 in the store, 0.0 now" in line


def test_texts_are_no_prompts(desk: Desk) -> None:
    desk.edit("[logits]", f"{GENERATE}[logits]")
    line = desk.refused("teacher-logits", "r.toml")
    assert "teacher.generate needs prompts or chats" in line
