"""Stage one in several processes, as `torchrun` starts them."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.store.reader import open_store
from coldstill.stages.capture.teacher import Loading, load_teacher

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)

SMALL = ("--set", "logits.shard_tokens=64", "--set", "logits.batch_tokens=64")


def shards(desk: Desk) -> dict[str, str]:
    return {name: digest for name, (digest, _) in desk.snapshot().items() if "/shards/" in name}


def test_torchrun_makes_the_store_that_one_process_makes(desk: Desk) -> None:
    ended = desk.torchrun("teacher-logits", "r.toml", *SMALL)
    assert ended.returncode == 0, ended.stderr
    assert (
        len(re.findall("^corpus: train: ", ended.stderr, re.MULTILINE)) == 1
    )  # one process tells of the corpus, not two
    together = shards(desk)
    assert not list(desk.run.rglob("claims"))
    assert "complete: " in desk.done("teacher-logits", "r.toml", *SMALL).stderr
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *SMALL)
    assert together == shards(desk)


def test_a_teacher_in_slices_says_what_the_whole_one_says(desk: Desk) -> None:
    sliced = (*SMALL, "--set", "teacher.tensor_parallel=true", "--set", "logits.codec=plain")
    ended = desk.torchrun("teacher-logits", "r.toml", *sliced)
    assert ended.returncode == 0, ended.stderr
    ours = open_store(desk.run / "logits")
    block = ours.read(np.arange(len(ours)))
    shutil.move(desk.run, desk.root / "sliced")
    desk.done("teacher-logits", "r.toml", *SMALL, "--set", "logits.codec=plain")
    theirs = open_store(desk.run / "logits").read(np.arange(len(ours)))
    np.testing.assert_array_equal(block.sequences.hashes, theirs.sequences.hashes)
    assert (block.targets.head_ids == theirs.targets.head_ids).mean() > 0.999
    for name in ("head_logprobs", "label_logprob", "entropy", "log_tail"):
        np.testing.assert_allclose(
            getattr(block.targets, name), getattr(theirs.targets, name), rtol=1e-3, atol=1e-3
        )


def test_slices_need_several_processes(desk: Desk) -> None:
    line = desk.refused("teacher-logits", "r.toml", "--set", "teacher.tensor_parallel=true")
    assert line.startswith("error: teacher.tensor_parallel: needs several processes, this is one; ")
    assert not (desk.run / "logits").exists()


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_a_teacher_that_is_spread_out_says_the_same(desk: Desk, place: str) -> None:
    desk.done("teacher-logits", "r.toml", *SMALL)
    whole = shards(desk)
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *SMALL, "--set", f"teacher.device_map={place}")
    assert shards(desk) == whole


def test_only_one_of_two_places_for_a_teacher(desk: Desk) -> None:
    both = ("--set", "teacher.tensor_parallel=true", "--set", "teacher.device_map=auto")
    assert "has both 'tensor_parallel' and 'device_map'" in desk.refused("plan", "r.toml", *both)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_and_any_attention(desk: Desk, dtype: str, attention: str) -> None:
    options = ("--set", f"teacher.dtype={dtype}", "--set", f"teacher.attention={attention}")
    desk.done("teacher-logits", "r.toml", *SMALL)
    whole = open_store(desk.run / "logits")
    expected = whole.read(np.arange(len(whole))).targets.label_logprob
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *SMALL, *options)
    store = open_store(desk.run / "logits")
    assert store.manifest.teacher.dtype == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    found = store.read(np.arange(len(store))).targets.label_logprob
    assert 0 < np.abs(found - expected).mean() < 0.2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_teacher_says_the_same(desk: Desk) -> None:
    few = (*SMALL, "--set", "logits.sequences=8", "--set", "evaluation.sequences=4")
    desk.done("teacher-logits", "r.toml", *few)
    whole = open_store(desk.run / "logits")
    expected = whole.read(np.arange(len(whole))).targets
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *few, "--set", "teacher.compile=true")
    store = open_store(desk.run / "logits")
    found = store.read(np.arange(len(store))).targets
    np.testing.assert_allclose(found.label_logprob, expected.label_logprob, rtol=1e-3, atol=1e-3)


def test_slices_must_be_equal(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    loading = Loading(dtype="fp32", tensor_parallel=True)
    with pytest.raises(ColdstillError) as error:
        load_teacher(
            str(teacher_folder), "teacher.model", loading, vocabulary=320, sequence_length=32
        )
    assert str(error.value) == (
        f"teacher.model: num_attention_heads = 2 of {teacher_folder} cannot be split into 3 equal "
        "slices; start a number of processes that divides it"
    )


def test_where_it_cannot_be_written_is_told_before_the_corpus_is_read(desk: Desk) -> None:
    desk.write("ro", "a file where a folder should be")
    line = desk.refused("teacher-logits", "r.toml", "--set", "logits.path=ro/store")
    assert line.startswith(f"error: {desk.root / 'ro'}")
