"""Fixtures: a byte-pair tokenizer, small random models and short texts, made once per process."""

from __future__ import annotations

import gc
import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.stages.config import CorpusConfig, TokenizerConfig
from coldstill.stages.corpus.train_tokenizer import train_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from small_runs import SmallCorpus

VOCABULARY = 320
WORDS = [
    "the",
    "teacher",
    "speaks",
    "once",
    "and",
    "every",
    "student",
    "listens",
    "for",
    "as",
    "long",
    "as",
    "it",
    "likes",
    "to",
    "learn",
]

logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)  # these models are tiny: a second thread would only wait


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of different lengths."""
    random = np.random.default_rng(seed)
    return [
        f"{i}: " + " ".join(random.choice(WORDS, int(random.integers(3, 60)))) for i in range(count)
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no process works on alone at the end."""
    longest = ("test_documents.py", "_processes.py")
    items.sort(key=lambda item: not item.path.name.endswith(longest))
    if importlib.util.find_spec("llama_cpp") is None:
        skip = pytest.mark.skip(reason="needs llama.cpp: make test-llama")
        for item in items:
            if item.get_closest_marker("llama_cpp"):
                item.add_marker(skip)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Keep modules and other long-lived objects out of every garbage collection of a test file.

    There are over a million, and training and measuring collect so often that looking through them
    would take a large part of the time of all tests.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep remote stores of the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDSTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _brief_measurements() -> Iterator[None]:
    """Measure speeds once only: the tests do not use the values, and the machine may be busy."""
    from coldstill.stages import teacher_logits
    from coldstill.stages.evaluation import speed as generation_speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation_speed, "_REPEATS", 1)
        patch.setattr(teacher_logits, "_LEAST_SECONDS", 60.0)
        patch.setattr(teacher_logits, "_MOST_SECONDS", 60.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_progress_lines() -> Iterator[None]:
    """Keep progress lines, which depend on the clock, out of the output."""
    from coldstill.pipeline.cli import progress as progress_lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_lines, "BRIEF", 1e9)
        patch.setattr(progress_lines, "INTERVALS", (1e9,))
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 short text files."""
    folder = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(sentences(60)):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer of `VOCABULARY` tokens, saved."""
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    corpus = CorpusConfig(files=(str(texts),))
    train_tokenizer(folder, TokenizerConfig(vocabulary=VOCABULARY), corpus, texts)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Any:
    """The tokenizer of `tokenizer_folder`, loaded."""
    from coldstill.stages.models.loading import load_tokenizer

    return load_tokenizer(str(tokenizer_folder), "test")


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "llama": {"tie_word_embeddings": False},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 64},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "gpt_neox": {"rotary_pct": 0.25},
}
"""Small configurations by family; tests of models run on each."""


def make_model(name: str, vocabulary: int, seed: int = 0, **settings: Any) -> Any:
    """A small model of `FAMILIES` with random weights large enough for confident logits.

    settings  override keys of its configuration
    """
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    family = name.split("-")[0]
    if family in ("gpt2", "gpt_neox"):
        sizes.pop("num_key_value_heads")
    if family == "gpt2":
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            sizes.pop(key)
        sizes.pop("max_position_embeddings")
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES.get(name, {}), **settings})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="session")
def teacher_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a vocabulary padded past the tokenizer, saved with it."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    make_model("llama", VOCABULARY + 16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def corpus(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> SmallCorpus:
    """The corpus of `small_runs`."""
    from small_runs import prepare

    return prepare(tmp_path_factory.mktemp("corpus"), tokenizer)


@pytest.fixture(scope="session")
def saved_teacher(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with large logits, also in its padding rows."""
    from small_runs import save_teacher

    return save_teacher(tmp_path_factory.mktemp("saved-teacher") / "model", tokenizer)


@pytest.fixture(scope="session")
def store(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """A small store to train from; its sequences differ in the number of supervised positions."""
    from coldstill.data.schema import Capture
    from small_runs import capture_store

    folder = tmp_path_factory.mktemp("store") / "logits"
    return capture_store(corpus, saved_teacher, folder, Capture(head=8, tail=8))
