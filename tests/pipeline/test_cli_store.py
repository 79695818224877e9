"""The `coldstill store` commands: options, exit codes and output."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.files import tokens_sha256
from coldstill.data.maintenance.verify import verify
from coldstill.data.schema import Capture
from coldstill.data.store.layout import TOKENIZER
from coldstill.data.store.reader import open_store
from inspected import TOKENS, desk_at, write_tokenizer
from oracles import FULL, manifest_for, random_block, write_missing
from printed import sentences
from spellings import byte_pairs, saved, text_store

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Block
    from desk import Desk

pytest_plugins = ("desk",)

COUNT = 10
BLOCK = random_block(7, COUNT)
FINGERPRINT = tokens_sha256({token: i for i, token in enumerate(TOKENS)})


def write_whole(root: Path, block: Block = BLOCK, corpus: str = "3", **options: Any) -> None:
    """Write a complete store without faults."""
    manifest = manifest_for(block, **options)
    manifest = replace(
        manifest,
        tokenizer=replace(manifest.tokenizer, fingerprint=FINGERPRINT),
        corpus=replace(manifest.corpus, fingerprint=corpus * 64),
    )
    write_missing(root, manifest, block)
    write_tokenizer(root / TOKENIZER)


@pytest.fixture
def alone(tmp_path: Path) -> Desk:
    """A desk with the stores `s` and `t`, of two corpora."""
    write_whole(tmp_path / "s")
    write_whole(tmp_path / "t", random_block(8, 5), corpus="4", codec="compact", store="zarr")
    return desk_at(tmp_path)


def damage(desk: Desk, shard: int) -> None:
    """Change one byte of a shard of `s`."""
    path = desk.root / "s" / "shards" / f"{shard:05d}.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def misstate(desk: Desk) -> int:
    """Commit an impossible entropy to `s`; returns its position."""
    entropy = BLOCK.targets.entropy.copy()
    entropy[-1] = 99.0
    block = replace(BLOCK, targets=replace(BLOCK.targets, entropy=entropy))
    for shard in (desk.root / "s" / "shards").glob("00002.*"):
        shard.unlink()
    write_missing(desk.root / "s", open_store(desk.root / "s", incomplete=True).manifest, block)
    return int(BLOCK.sequences.positions.values[-1])


WRITING = {
    "convert": ["convert", "s", "new", "--codec", "compact", "--levels", "63", "--store", "zarr"],
    "merge": ["merge", "s", "t", "new", "--codec", "plain", "--zstd", "5"],
    "slice": ["slice", "s", "new", "--sequences", "2:9", "--fraction", "0.5", "--seed", "3"],
    "shrink": ["shrink", "s", "new", "--head", "2", "--tail", "1"],
}
SEQUENCES = {"convert": 10, "merge": 15, "slice": 4, "shrink": 10}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITING)
def test_a_command_prints_what_it_wrote_and_never_writes_it_twice(alone: Desk, name: str) -> None:
    result = alone.done("store", *WRITING[name])
    assert sentences(result.stderr) == []
    before = alone.snapshot()
    assert alone.done("store", *WRITING[name]).stdout == result.stdout
    as_json = json.loads(alone.done("store", *WRITING[name], "--json").stdout)
    assert alone.snapshot() == before
    made = open_store(alone.root / "new")
    assert list(verify(str(alone.root / "new"))) == []
    files = [path for path in (alone.root / "new" / "shards").rglob("*") if path.is_file()]
    records = {*(alone.root / "new" / "shards").glob("*.json")}
    size = sum(path.stat().st_size for path in files if path not in records)
    assert len(made) == SEQUENCES[name]
    facts = {"wrote": "new", "sequences": len(made), "positions": made.positions, "bytes": size}
    assert as_json == facts
    counts = f"{len(made)} sequences, {made.positions} positions"
    assert result.stdout == f"wrote new: {counts}, {size / made.positions:.1f} bytes each\n"


@pytest.mark.slow
def test_unspecified_settings_are_kept(alone: Desk) -> None:
    compact = {"name": "compact", "levels": 127}
    cases: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("t", compact, {"name": "zarr", "zstd": 1, "packed": True}),
        ("t --codec plain", {"name": "plain"}, {"name": "zarr", "zstd": 3, "packed": False}),
        ("t --store arrow", compact, {"name": "arrow"}),
        ("t --zstd 7", compact, {"name": "zarr", "zstd": 7}),
        ("s --zstd 7", {"name": "plain"}, {"name": "arrow", "zstd": 7}),
        ("s --levels 31", {"name": "compact", "levels": 31}, {"name": "arrow", "zstd": 1}),
        ("s --store zarr --zstd 0", {"name": "plain"}, {"name": "zarr", "zstd": 0}),
    )
    for number, (options, codec, store) in enumerate(cases):
        path, *rest = options.split()
        alone.done("store", "convert", path, f"new{number}", *rest)
        manifest = open_store(alone.root / f"new{number}").manifest
        assert codec.items() <= manifest.codec.items(), options
        assert store.items() <= manifest.store.items(), options


@pytest.mark.slow
def test_a_shrunken_store_is_smaller(alone: Desk) -> None:
    alone.done("store", *WRITING["shrink"])
    made = open_store(alone.root / "new")
    assert made.manifest.capture == replace(FULL, head=2, tail=1)
    found = made.read(np.arange(COUNT)).targets
    assert np.array_equal(found.head_ids, BLOCK.targets.head_ids[:, :2])


@pytest.mark.slow
def test_verify_reports_that_a_whole_store_is_whole(alone: Desk) -> None:
    before = alone.snapshot()
    for path in ("s", "t"):
        result = alone.done("store", "verify", path)
        assert (result.stdout, sentences(result.stderr)) == (f"{path}: whole\n", [])
        facts = json.loads(alone.done("store", "verify", path, "--json").stdout)
        assert facts == {"path": path, "whole": True, "problems": []}
    assert alone.snapshot() == before


def failed(desk: Desk, *arguments: str) -> str:
    """The output of a command that ends with status 1 and prints no error line."""
    result = desk.coldstill(*arguments)
    assert isinstance(result.exception, SystemExit)
    assert (result.exit_code, sentences(result.stderr)) == (1, [])
    return result.stdout


@pytest.mark.slow
def test_verify_names_damage_positions_and_missing_shards(alone: Desk) -> None:
    damage(alone, 0)
    position = misstate(alone)
    row = int(np.flatnonzero(BLOCK.sequences.positions.lengths)[-1])
    where = f"shard 2, sequence {row}, position {position}"
    *problems, summary = failed(alone, "store", "verify", "s").splitlines()
    assert [line.split(":")[0] for line in problems] == ["shard 0", where]
    assert problems[1].startswith(f"{where}: an entropy that is not in ")
    assert summary == (
        "s: 2 problems, the first damage at shard 0; delete the damage with coldstill store repair"
    )
    facts = json.loads(failed(alone, "store", "verify", "s", "--json"))
    assert (facts["path"], facts["whole"]) == ("s", False)
    assert [problem["shard"] for problem in facts["problems"]] == [0, 2]
    names = {"shard", "sequence", "position", "what", "missing"}
    assert all(set(problem) == names for problem in facts["problems"])
    problem = facts["problems"][1]
    assert (problem["sequence"], problem["position"]) == (row, position)
    assert problem["missing"] is False
    for path in (alone.root / "t" / "shards").glob("00001*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert failed(alone, "store", "verify", "t").splitlines() == [
        "shard 1: missing",
        "t: 1 problem, all of missing shards; finish the store with coldstill teacher-logits",
    ]
    problems = json.loads(failed(alone, "store", "verify", "t", "--json"))["problems"]
    assert [(problem["shard"], problem["missing"]) for problem in problems] == [(1, True)]


def test_many_problems_are_counted_not_listed(tmp_path: Path) -> None:
    write_whole(tmp_path / "s", random_block(7, 30), shard_sequences=1)
    for shard in range(1, 30):
        (tmp_path / "s" / "shards" / f"{shard:05d}.arrow").write_bytes(b"")
    lines = failed(desk_at(tmp_path), "store", "verify", "s").splitlines()
    assert len(lines) == 20 + 2
    assert lines[-2] == "and 9 more"
    assert lines[-1].startswith("s: 29 problems, the first damage at shard 1; ")


@pytest.mark.slow
def test_a_repair_leaves_a_gap_that_can_be_filled(alone: Desk) -> None:
    damage(alone, 1)
    alone.write("s/shards/notes.txt", "a")
    before = alone.snapshot()
    lines = alone.done("store", "repair", "s", "--dry-run").stdout.splitlines()
    assert lines[0].startswith("shard 1: ")
    missing = "s: 1 shard missing; run coldstill teacher-logits again"
    assert lines[1:] == ["s: would delete 1 shard and 1 stray file", missing]
    facts = json.loads(alone.done("store", "repair", "s", "--dry-run", "--json").stdout)
    assert alone.snapshot() == before
    assert [problem["shard"] for problem in facts.pop("problems")] == [1]
    assert facts == {"path": "s", "dropped": [1], "strays": ["notes.txt"], "missing": 1}
    result = alone.done("store", "repair", "s")
    assert sentences(result.stderr) == []
    assert result.stdout.splitlines()[1:] == ["s: deleted 1 shard and 1 stray file", missing]
    store = open_store(alone.root / "s", incomplete=True)
    assert store.done == [0, 2]
    write_missing(alone.root / "s", store.manifest, BLOCK)
    assert alone.done("store", "verify", "s").stdout == "s: whole\n"
    assert alone.done("store", "repair", "s").stdout == "s: whole, nothing to repair\n"


@pytest.mark.slow
def test_an_impossible_request_is_refused_in_one_line(alone: Desk) -> None:
    for arguments, message in (
        ("verify none", "none: no manifest.json there, so not a store"),
        ("convert none new", "none: no manifest.json there, so not a store"),
        ("convert s s", "s: is the store that is read; choose another place"),
        ("convert s t", "t: made differently: "),
        ("convert s new --codec dense", "codec 'dense' is not known to this version"),
        ("convert s new --levels 3", "codec 'compact': levels 3: 15 to 254"),
        ("merge s s new", "s: its sequence 0 is in s too"),
        ("slice s new", "slice: name what to keep: --sequences, --documents or --fraction"),
        ("slice s new --sequences 3", "--sequences: '3' is not a range such as 10:20"),
        ("slice s new --fraction 2", "--fraction: 2.0 is not above 0 and at most 1"),
        ("shrink s new --head 5 --tail 3", "s: holds a head of 4 and a tail of 3"),
    ):
        line = alone.refused("store", *arguments.split())
        assert line.startswith(f"error: {message}"), arguments
    damage(alone, 0)
    for words in (*WRITING.values(), ["slice", "s", "new", "--sequences", "0:9"]):
        if "--fraction" not in words:  # a fraction may not contain the damaged shard
            line = alone.refused("store", *words)
            assert line.startswith("error: s/shards/00000.arrow: damaged: its checksum is not ")


@pytest.mark.slow
def test_wrong_usage_ends_with_status_2_and_writes_nothing(alone: Desk) -> None:
    before = alone.snapshot()
    for line in (
        "merge s", "merge", "convert s", "verify", "verify s t", "convert s new --levels many",
        "convert s new --zstd 23", "slice s new --fraction half",
        "slice s new --fraction 0.5 --seed -1", "shrink s new",
        "shrink s new --head -1 --tail 0", "nonsense s",
    ):  # fmt: skip
        result = alone.coldstill("store", *line.split())
        assert isinstance(result.exception, SystemExit), line
        assert result.exit_code == 2, line
        assert "Error: " in result.stderr
        assert "Traceback" not in result.output
    assert alone.snapshot() == before


@pytest.mark.slow
def test_a_store_is_written_in_the_tokens_of_a_student(tmp_path: Path) -> None:
    desk = desk_at(tmp_path)
    pairs = [("t", "h"), ("th", "e")]
    saved(tmp_path / "teacher", byte_pairs([*pairs, ("1", "2")], extra=["<|user|>"]))
    saved(tmp_path / "student", byte_pairs([*pairs, ("the", "n")], end="</s>"), end="</s>")
    texts = ["<|user|>the 12", "a then the"]
    text_store(tmp_path / "s", tmp_path / "teacher", texts, Capture(head=3, tail=4))
    command = ("store", "retokenize", "s", "new", "--tokenizer", "./student")
    line = desk.refused(*command)
    assert "document 0, token 0: the special token '<|user|>' has no counterpart in the" in line
    assert "tokenizer of ./student; say what to write for it (special: <|user|> = TEXT)" in line
    assert desk.refused(*command, "--special", "user").endswith("such as '<|im_end|>=</s>'")
    assert "no folder ./none" in desk.refused(*command[:4], "--tokenizer", "./none")
    told = (*command, "--special", "<|user|>=</s>")
    assert desk.coldstill(*told, "--ambiguous", "guess").exit_code == 2
    result = desk.done(*told)
    made = open_store(tmp_path / "new")
    assert result.stdout.startswith(f"wrote new: 1 sequences, {made.positions} positions, ")
    assert json.loads(desk.done(*told, "--json").stdout)["positions"] == made.positions
    assert list(verify(str(tmp_path / "new"))) == []
    shown = " ".join(desk.done("inspect", "new").stdout.split())
    assert "retokenized from 261 tokens" in shown
    assert "positions with the teacher's distribution, 0.00% of its labels left out" in shown
    measured = made.manifest.retokenized
    assert measured is not None
    assert re.search(
        r"branches \d+\.\d\d% of the probability is of words of several tokens;", shown
    )
    assert "at most 0.25 of them for each token are kept beside the text, for the loss" in shown
    share = measured.ambiguous_mass / measured.positions
    assert f"ambiguous {share:.2%} of the probability of such a position is of tokens" in shown
    desk.done(*told[:2], "s", "none", *told[4:], "--branches", "0")
    assert "beside the text" not in desk.done("inspect", "none").stdout
    for wrong in ("-1", "nan"):
        assert desk.coldstill(*told, "--branches", wrong).exit_code == 2
    assert "retokenized.branches" in desk.refused(*told, "--branches", "0.5")
    facts = json.loads(desk.done("inspect", "new", "--json").stdout)
    assert facts["manifest"]["retokenized"]["counts"]["left_labels"] == 0
    assert "retokenized" not in json.loads(desk.done("inspect", "s", "--json").stdout)["manifest"]
