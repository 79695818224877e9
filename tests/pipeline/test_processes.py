"""Stages in several processes, as `torchrun` starts them, and runs with remote stores."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from coldstill.data.places.cache import CacheSettings
from coldstill.data.places.claims import claimed
from coldstill.data.store.reader import open_store
from coldstill.pipeline.recipe.reading import load_recipe
from coldstill.pipeline.recipe.run_folder import open_run, record_recipe, recorded_run
from coldstill.stages.capture.teacher import Loading, load_teacher
from conftest import VOCABULARY, make_model
from oracles import cached_bytes, digests
from small_runs import CLOCKS

if TYPE_CHECKING:
    from coldstill.data.schema import Block
    from desk import Desk, Processes
    from distance import Distance

pytest_plugins = ("desk", "distance")

SMALL = ("--set", "logits.shard_tokens=64", "--set", "logits.batch_tokens=64")


def shards(desk: Desk) -> dict[str, str]:
    return {name: digest for name, (digest, _) in desk.snapshot().items() if "/shards/" in name}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, texts: Path, teacher_folder: Path) -> Desk:
    """A desk with the store that one process captures."""
    from desk import RECIPE, Desk

    desk = Desk(tmp_path_factory.mktemp("whole"))
    desk.write("r.toml", RECIPE.format(texts=texts, teacher=f'model = "{teacher_folder}"'))
    desk.done("teacher-logits", "r.toml", *SMALL, "--set", "logits.codec=plain")
    return desk


def block_of(desk: Desk) -> Block:
    """The content of the store of a desk."""
    store = open_store(desk.run / "logits")
    return store.read(np.arange(len(store)))


@pytest.mark.slow
def test_torchrun_makes_the_store_that_one_process_makes(desk: Desk, whole: Desk) -> None:
    plain = (*SMALL, "--set", "logits.codec=plain")
    ended = desk.torchrun("teacher-logits", "r.toml", *plain)
    assert ended.returncode == 0, ended.stderr
    reports = re.findall("^corpus: train: ", ended.stderr, re.MULTILINE)
    assert len(reports) == 1  # only one process reports the corpus
    assert not list(desk.run.rglob("claims"))
    assert "complete: " in desk.done("teacher-logits", "r.toml", *plain).stderr
    assert shards(desk) == shards(whole)


@pytest.mark.slow
def test_a_teacher_in_slices_gives_the_targets_of_the_whole_one(
    desk: Desk, whole: Desk, processes: Processes
) -> None:
    sliced = (*SMALL, "--set", "teacher.tensor_parallel=true", "--set", "logits.codec=plain")
    code, output = processes.together(desk, "teacher-logits", "r.toml", *sliced)
    assert code == 0, output
    ours, theirs = block_of(desk), block_of(whole)
    np.testing.assert_array_equal(ours.sequences.hashes, theirs.sequences.hashes)
    assert (ours.targets.head_ids == theirs.targets.head_ids).mean() > 0.999
    for name in ("head_logprobs", "label_logprob", "entropy", "log_tail"):
        found, expected = getattr(ours.targets, name), getattr(theirs.targets, name)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_a_teacher_on_several_devices_gives_the_same_store(
    desk: Desk, whole: Desk, place: str
) -> None:
    spread = ("--set", f"teacher.device_map={place}", "--set", "logits.codec=plain")
    desk.done("teacher-logits", "r.toml", *SMALL, *spread)
    assert shards(desk) == shards(whole)
    both = ("--set", "teacher.tensor_parallel=true", "--set", "teacher.device_map=auto")
    assert "has both 'tensor_parallel' and 'device_map'" in desk.refused("plan", "r.toml", *both)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_teacher_runs_in_half_precision_with_any_attention(
    desk: Desk, whole: Desk, dtype: str, attention: str
) -> None:
    options = ("--set", f"teacher.dtype={dtype}", "--set", f"teacher.attention={attention}")
    desk.done("teacher-logits", "r.toml", *SMALL, *options)
    store = open_store(desk.run / "logits")
    assert store.manifest.teacher.dtype == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    expected = block_of(whole).targets.label_logprob
    found = block_of(desk).targets.label_logprob
    assert 0 < np.abs(found - expected).mean() < 0.2


def test_slices_need_several_processes(desk: Desk) -> None:
    line = desk.refused("teacher-logits", "r.toml", "--set", "teacher.tensor_parallel=true")
    assert line.startswith("error: teacher.tensor_parallel: needs several processes, this is one; ")
    assert not (desk.run / "logits").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_compiled_teacher_gives_the_same_targets(desk: Desk, tokenizer: Any) -> None:
    # one layer: compiling takes seconds a layer
    make_model("llama", VOCABULARY + 16, num_hidden_layers=1).save_pretrained(desk.root / "shallow")
    tokenizer.save_pretrained(desk.root / "shallow")
    desk.edit('model = "', 'model = "shallow" #')
    few = (*SMALL, "--set", "logits.sequences=8", "--set", "evaluation.sequences=4")
    desk.done("teacher-logits", "r.toml", *few)
    expected = block_of(desk).targets.label_logprob
    plain = desk.json("heldout", "measurements.json")["usage"]
    shutil.rmtree(desk.run)
    desk.done("teacher-logits", "r.toml", *few, "--set", "teacher.compile=true")
    usage = desk.json("heldout", "measurements.json")["usage"]
    assert usage["flops_per_token"] == plain["flops_per_token"] > 0
    assert len(usage["generation"]) == len(plain["generation"]) > 0
    found = block_of(desk).targets.label_logprob
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


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


def test_a_folder_that_cannot_be_written_is_refused_before_the_corpus_is_read(desk: Desk) -> None:
    desk.write("ro", "a file where a folder should be")
    line = desk.refused("teacher-logits", "r.toml", "--set", "logits.path=ro/store")
    assert line.startswith(f"error: {desk.root / 'ro'}")


def lines(folder: Path) -> list[dict[str, Any]]:
    found = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in found]


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_torchrun_trains_the_student_that_one_process_trains(
    finished: Desk, processes: Processes, sharded: bool
) -> None:
    settings = ["--set", "students.n.train.steps=5"]
    if sharded:
        settings += ["--set", 'students.n.train.trainer={ fsdp = "full_shard" }']
    finished.edit("[students.baseline]", '[students.n]\nlike = "small"\n[students.baseline]')
    command = ("train-student", "r.toml", "--student", "n", *settings)
    if sharded:  # how the processes start makes no difference to how they share the weights
        code, output = processes.together(finished, *command)
    else:
        ended = finished.torchrun(*command)
        code, output = ended.returncode, ended.stderr
    assert code == 0, output
    # Only one of the processes reports; a slow machine repeats lines of progress.
    for sentence in ("kl unbiased with this record", "parameters trained"):
        assert output.count(sentence) == 1
    assert "warning" not in output.lower()
    finished.edit("[students.baseline]", '[students.alone]\nlike = "small"\n[students.baseline]')
    setting = ("--set", "students.alone.train.steps=5")
    finished.done("train-student", "r.toml", "--student", "alone", *setting)
    students = finished.run / "students"
    for one, other in zip(lines(students / "n"), lines(students / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-9)
    finished.done("evaluate", "r.toml")
    figures = [finished.json("students", name, "evaluation.json") for name in ("n", "alone")]
    assert math.isclose(figures[0]["loss"], figures[1]["loss"], rel_tol=1e-5)
    config = finished.json("students", "n", "model", "config.json")
    assert config == finished.json("students", "alone", "model", "config.json")
    assert not list(finished.run.rglob(".training"))


@pytest.mark.slow
def test_one_run_at_a_time_trains_a_student(finished: Desk) -> None:
    new = ("train-student", "r.toml", "--student", "n", "--set", "students.small.train.steps=2")
    folder = finished.run / "students" / "n"
    with claimed(folder / ".training") as ours:
        assert ours
        line = finished.refused(*new)
    assert line == (
        "error: runs/r/students/n: another process is training this student; wait for it, or "
        "train another under a new name (--student NEW)"
    )
    assert not folder.exists()
    finished.done(*new)
    assert (folder / "model").exists()


@pytest.mark.slow
def test_sharded_weights_need_several_processes(finished: Desk) -> None:
    sharded = 'students.small.train.trainer={ fsdp = "full_shard" }'
    line = finished.refused("train-student", "r.toml", "--student", "n", "--set", sharded)
    assert "train.trainer: transformers cannot train with these settings: Using fsdp only" in line
    assert not (finished.run / "students" / "n").exists()


def use_remote_stores(desk: Desk, distance: Distance, **more: str) -> None:
    """Make both stores of the recipe remote, with a cache on the desk."""
    keys = {"path": f"{distance.url}/logits", "cache": "300 kB", "cache_folder": "cache"} | more
    lines = "\n".join(f'{key} = "{value}"' for key, value in keys.items())
    desk.edit("[logits]\n", f"[logits]\n{lines}\n")
    desk.edit("[evaluation]\n", f'[evaluation]\npath = "{distance.url}/heldout"\n')


def losses(desk: Desk) -> list[Any]:
    text = (desk.run / "students" / "small" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["loss"] for line in text.splitlines()]


@pytest.mark.slow
def test_a_run_with_its_stores_use_remote_stores_makes_the_same_students(
    finished: Desk, s3: Distance
) -> None:
    before, local = losses(finished), digests(finished.run / "logits")
    shutil.rmtree(finished.run)
    use_remote_stores(finished, s3)
    planned = finished.done("plan", "r.toml").stdout
    assert f", to do, in {s3.url}/logits" in planned
    assert " for the cache, " in planned
    s3.network.spoil("denied", r"PUT .*logits/shards/00002\.json", times=1)
    stopped = finished.coldstill("run", "r.toml")
    assert stopped.exit_code == 1
    last = stopped.stderr.splitlines()[-1]
    assert last.startswith(f"error: {s3.url}/logits/shards/00002.json: access refused")
    resumed = finished.done("run", "r.toml")
    assert "teacher-logits train: continuing: 2 of " in resumed.stderr
    far = s3.digests("logits")
    measured = "measurements.json"  # a measurement is never the same
    assert far.keys() == local.keys()
    assert [n for n in far if far[n] != local[n] and n != measured] == []
    assert losses(finished) == before
    assert not (finished.run / "logits").exists()
    assert not (finished.run / "heldout").exists()
    assert 0 < cached_bytes(finished.root / "cache") <= 300_000
    again = finished.done("run", "r.toml").stderr
    assert f"complete: {s3.url}/logits and {s3.url}/heldout" in again
    shown = finished.done("inspect", "runs/r").stdout
    assert f"{s3.url}/logits" in shown


@pytest.mark.slow
def test_missing_and_other_remote_stores_are_refused(desk: Desk, memory: Distance) -> None:
    use_remote_stores(desk, memory)
    line = desk.refused("train-student", "r.toml")
    assert line == (
        f"error: {memory.url}/logits: no store there; make it first with coldstill teacher-logits r"
    )
    desk.done("teacher-logits", "r.toml")
    line = desk.refused("teacher-logits", "r.toml", "--set", "corpus.sequence_length=16")
    assert "; logits was made from it" in line
    line = desk.refused("teacher-logits", "r.toml", "--set", "logits.head=5")
    assert f"{memory.url}/logits: made differently: capture.head" in line
    line = desk.refused("train-student", "r.toml", "--set", "logits.cache=9 kB")
    assert line.startswith(f"error: {memory.url}/logits: logits.cache: 9,000 bytes are too few: ")
    local = ("--set", "logits.path=elsewhere/logits", "--set", "name=local")
    desk.done("teacher-logits", "r.toml", *local)
    assert open_store(desk.root / "elsewhere" / "logits").place.room is None
    assert not (desk.root / "runs" / "local" / "logits").exists()


def test_a_run_records_where_its_stores_are(desk: Desk, memory: Distance) -> None:
    use_remote_stores(desk, memory)
    loaded = load_recipe(str(desk.root / "r.toml"))
    run = open_run(desk.root / "runs", "r", loaded)
    assert run.logits == f"{memory.url}/logits"
    assert run.heldout == f"{memory.url}/heldout"
    assert run.cache == CacheSettings(folder=desk.root / "cache", bytes=300_000)
    assert recorded_run(run.root).logits == run.root / "logits"  # nothing is recorded yet
    record_recipe(run, loaded)
    assert recorded_run(run.root) == run


def test_the_size_of_a_cache_is_read_or_refused(desk: Desk) -> None:
    recipe = str(desk.root / "r.toml")
    assert load_recipe(recipe, ("logits.cache=5000",)).recipe.logits.cache == 5000
    assert load_recipe(recipe).recipe.logits.cache == 20 * 10**9
    assert open_run(Path("runs"), "r", load_recipe(recipe)).logits == Path("runs/r/logits")
    for value in ("20 potatoes", "", "0"):
        with pytest.raises(ColdstillError) as caught:
            load_recipe(recipe, (f'logits.cache="{value}"',))
        assert str(caught.value).endswith(
            f"r.toml: logits.cache: '{value}' is not a size; write a number and a unit, such as "
            "'20 GB'"
        )
