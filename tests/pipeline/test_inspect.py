"""What a store, a run or a shard says of itself."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from coldstill.data.ragged import Ragged
from coldstill.data.reader import open_store
from coldstill.data.schema import Capture
from coldstill.data.stores import STORES
from coldstill.pipeline.cli import main
from coldstill.pipeline.inspect_glyphs import ASCII, BLOCKS, cell, glyphs_for, histogram
from coldstill.pipeline.inspect_store import ranges
from inspected import SEQUENCES, desk_at, write_store
from oracles import VOCABULARY, manifest_for, random_block, write_missing

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk",)


def told(desk: Desk, *arguments: str) -> Any:
    """What a look at something gives as JSON."""
    return json.loads(desk.done("inspect", *arguments, "--json").stdout)


@pytest.fixture
def alone(tmp_path: Path) -> Desk:
    """A desk with a store `s` on it and nothing else."""
    write_store(tmp_path / "s")
    return desk_at(tmp_path)


def test_inspect_tells_what_is_in_a_store(finished: Desk) -> None:
    store = open_store(finished.run / "logits")
    block = next(iter(store.batches(len(store))))
    facts = told(finished, "runs/r/logits")
    assert facts["shards"] == facts["shards_done"] == store.manifest.shards
    assert facts["manifest"]["teacher"] == finished.json("logits", "manifest.json")["teacher"]
    assert facts["shards_missing"] == []
    assert facts["sequences"] == len(store)
    assert facts["document_pieces"] == len(block.sequences.document_ids.values)
    assert facts["tokens"] == len(block.sequences.tokens.values)
    assert facts["positions"] == len(block.targets)
    files = (finished.run / "logits" / "shards").glob("*.arrow")
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    measured = facts["measurements"]
    assert measured["capture_tokens_per_second"] > 0
    speed = f"captured at {measured['capture_tokens_per_second']:,.0f} tokens/s"
    assert speed in finished.done("inspect", "runs/r/logits").stdout


def test_the_figures_are_those_of_the_targets(tmp_path: Path) -> None:
    block = write_store(tmp_path / "s")
    facts = told(desk_at(tmp_path), "s")
    targets, count = block.targets, len(block.targets)
    loss = -targets.label_logprob.astype(np.float64).mean()
    mass_M = np.exp(targets.head_logprobs.astype(np.float64)).sum(1)
    assert facts["teacher_loss"] == pytest.approx(loss, rel=1e-6)
    assert facts["teacher_perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert facts["teacher_entropy"] == pytest.approx(targets.entropy.mean(), rel=1e-6)
    assert facts["head_mass"] == pytest.approx(mass_M.mean(), rel=1e-6)
    bins = facts["histograms"]
    assert sum(bins["entropy"]["positions"]) == sum(bins["head_mass"]["positions"]) == count
    edges = [*bins["entropy"]["from"], np.inf]
    assert bins["entropy"]["positions"] == np.histogram(targets.entropy, edges)[0].tolist()
    edges = [*bins["head_mass"]["from"], np.inf]
    assert bins["head_mass"]["positions"] == np.histogram(mass_M, edges)[0].tolist()


def test_what_a_codec_cost_is_a_mean_over_all_positions(tmp_path: Path) -> None:
    write_store(tmp_path / "s", codec="compact")
    store = open_store(tmp_path / "s")
    facts = told(desk_at(tmp_path), "s")
    assert facts["codec_kl"] == store.statistics.distortion / store.positions > 0
    text = desk_at(tmp_path).done("inspect", "s").stdout
    assert "codec       compact, levels 127" in text
    assert f"mean KL {facts['codec_kl']:.2g} nats a position" in text


def test_inspect_is_readable(finished: Desk) -> None:
    text = finished.done("inspect", "runs/r/heldout").stdout
    lines = text.splitlines()
    rows = {line[:11].strip(): line[12:] for line in lines if line[:1].isalpha()}
    names = "store teacher tokenizer corpus packing capture codec shards holds size error says"
    assert list(rows)[:12] == names.split()
    assert rows["store"] == "runs/r/heldout (arrow, zstd 0)"
    assert rows["teacher"].startswith("teacher (llama, ")
    assert rows["tokenizer"].startswith("320 tokens")
    assert rows["packing"] == "up to 32 tokens, documents packed together, kept apart by positions"
    assert rows["capture"].startswith("head 16, tail 8, temperatures 1.0")
    assert rows["codec"] == "plain"
    assert rows["shards"].endswith(", complete")
    assert rows["error"].startswith("none, ")
    assert max(map(len, lines)) <= 100
    assert "\u2588" in text


def test_a_run_is_taken_for_its_store(finished: Desk) -> None:
    facts = told(finished, "runs/r")
    assert facts["note"] == (
        "runs/r is a run: this is its store runs/r/logits; it has another, runs/r/heldout"
    )
    assert {**facts, "note": ""} == told(finished, "runs/r/logits")
    assert finished.done("inspect", "runs/r/").stdout.startswith("runs/r/ is a run: ")


def test_the_histograms_are_plain_where_blocks_cannot_be_shown(alone: Desk) -> None:
    arguments = ["inspect", str(alone.root / "s")]
    plain = CliRunner(charset="ascii").invoke(main, arguments)
    assert plain.exit_code == 0
    assert plain.stdout.isascii()
    assert "##" in plain.stdout
    assert not CliRunner().invoke(main, arguments).stdout.isascii()
    assert (glyphs_for("utf-8"), glyphs_for("cp1252")) == (BLOCKS, ASCII)
    assert (glyphs_for(None), glyphs_for("no such encoding")) == (ASCII, ASCII)


def test_a_bar_is_as_high_as_what_it_counts() -> None:
    lines = histogram([0, 1, 500, 1000], BLOCKS, height=2, width=1)
    assert lines == ["   \u2588", " \u2581\u2588\u2588"]
    assert histogram([0, 0], ASCII, height=1) == ["    "]


def test_a_cell_is_as_wide_as_it_should_be() -> None:
    assert cell("abc", 5) == "abc  "
    assert cell("abcdef", 5) == "ab..."
    assert cell("\u65e5\u672c", 5) == "\u65e5\u672c "  # two columns each
    assert cell("e\u0301", 2) == "e\u0301 "  # an accent takes none


def test_without_a_head_nothing_is_said_of_what_it_covers(tmp_path: Path) -> None:
    write_store(tmp_path / "s", Capture(head=0, tail=6))
    text = desk_at(tmp_path).done("inspect", "s").stdout
    assert "top-1" not in text
    assert "inside the head" not in text
    assert told(desk_at(tmp_path), "s")["teacher_accuracy"] is None


def test_inspect_names_the_shards_that_are_missing(alone: Desk) -> None:
    for index in (0, 2):
        (alone.root / "s" / "shards" / f"{index:05d}.json").unlink()
    facts = told(alone, "s")
    assert (facts["shards"], facts["shards_done"], facts["shards_missing"]) == (3, 1, [0, 2])
    assert facts["sequences"] == 4
    assert "1 of 3, missing 0, 2\n" in alone.done("inspect", "s").stdout


def test_inspect_of_a_store_that_holds_no_shard_yet(alone: Desk) -> None:
    for record in (alone.root / "s" / "shards").glob("*.json"):
        record.unlink()
    text = alone.done("inspect", "s").stdout
    assert "0 sequences" in text
    assert "says" not in text
    assert "positions by" not in text
    assert told(alone, "s")["teacher_perplexity"] is None
    assert "holds no sequence yet" in alone.refused("inspect", "s", "--html", "p.html")


def test_inspect_touches_nothing(finished: Desk) -> None:
    before = finished.snapshot()
    finished.done("inspect", "runs/r/logits")
    finished.done("inspect", "runs/r", "--sequence", "1")
    finished.done("inspect", "runs/r/heldout", "--json")
    assert finished.snapshot() == before


@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", list(STORES))
def test_one_shard_is_looked_at_as_part_of_its_store(
    tmp_path: Path, store: str, codec: str
) -> None:
    write_store(tmp_path / "s", store=store, codec=codec)
    desk, name = desk_at(tmp_path), f"s/shards/00001{STORES[store].suffix}"
    facts = told(desk, name)
    part = open_store(tmp_path / "s").read(np.arange(4, 8))
    assert (facts["shard"], facts["rows"], facts["sequences"]) == (1, [4, 8], 4)
    assert facts["positions"] == len(part.targets)
    loss = -part.targets.label_logprob.mean()
    assert facts["teacher_loss"] == pytest.approx(loss, abs=0.01)
    assert sum(facts["histograms"]["entropy"]["positions"]) == len(part.targets)
    columns = {column["name"]: column for column in facts["columns"]}
    assert columns["token_ids"]["values"] == len(part.sequences.tokens.values)
    assert columns["head_ids"]["values"] == len(part.targets)
    text = desk.done("inspect", name).stdout
    assert "this shard  1: sequences 4 to 7; the rest is of it alone" in text


def test_a_shard_is_found_from_inside_its_folder(alone: Desk) -> None:
    inside = desk_at(alone.root / "s" / "shards")
    assert told(inside, "00002.arrow")["rows"] == [8, 10]
    assert told(desk_at(alone.root / "s"), "shards/00002.arrow")["rows"] == [8, 10]


@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", list(STORES))
def test_a_shard_without_a_manifest_tells_what_it_can(
    tmp_path: Path, store: str, codec: str
) -> None:
    block = write_store(tmp_path / "s", store=store, codec=codec)
    suffix = STORES[store].suffix
    shard, lone = tmp_path / "s" / "shards" / f"00000{suffix}", tmp_path / f"lone{suffix}"
    (shutil.copytree if shard.is_dir() else shutil.copy)(shard, lone)
    desk = desk_at(tmp_path)
    facts = told(desk, lone.name)
    assert (facts["store"], facts["path"]) == (store, lone.name)
    files = [path for path in [lone, *lone.rglob("*")] if path.is_file()]
    assert facts["bytes"] == sum(path.stat().st_size for path in files)
    columns = open_store(tmp_path / "s").manifest.make_codec("").encode(block.take(np.arange(4)))
    assert {column["name"] for column in facts["columns"]} == set(columns)
    for found in facts["columns"]:
        column = columns[found["name"]]
        values = column.values if isinstance(column, Ragged) else column
        kind = values.dtype.name + "".join(f" x {width}" for width in values.shape[1:])
        assert (found["type"], found["values"]) == (kind, len(values))
        assert (found["rows"], found["list"]) == (4, isinstance(column, Ragged))
    text = desk.done("inspect", lone.name).stdout
    assert text.startswith("there is no manifest.json in ")
    assert "holds       4 sequences" in text
    assert max(map(len, text.splitlines()[2:])) <= 100
    for view in (["--sequence", "0"], ["--html", "p.html"]):
        line = desk.refused("inspect", lone.name, *view)
        assert line.endswith("without it no target can be read")


def test_a_shard_without_a_commit_record_is_looked_at_by_itself(alone: Desk) -> None:
    (alone.root / "s" / "shards" / "00001.json").unlink()
    facts = told(alone, "s/shards/00001.arrow")
    assert facts["note"].startswith("the store s has no commit record of it")
    assert "manifest" not in facts


@pytest.mark.parametrize("store", list(STORES))
def test_a_damaged_shard_is_one_line(tmp_path: Path, store: str) -> None:
    write_store(tmp_path / "s", store=store)
    shard = tmp_path / "s" / "shards" / f"00001{STORES[store].suffix}"
    largest = max([shard, *shard.rglob("*")], key=lambda p: p.stat().st_size if p.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 255
    largest.write_bytes(content)
    desk = desk_at(tmp_path)
    name = str(shard.relative_to(tmp_path))
    for arguments in ([name], ["s", "--sequence", "5"], ["s", "--html", "p.html"]):
        line = desk.refused("inspect", *arguments)
        assert "damaged: its checksum is not the one it was written with" in line
    desk.done("inspect", "s")  # from the commit records, which are whole
    desk.done("inspect", "s", "--sequence", "0")


@pytest.mark.parametrize("name", ["lone.arrow", "s/shards/00009.arrow", "lone.zarr"])
def test_a_shard_that_is_not_there(alone: Desk, name: str) -> None:
    assert alone.refused("inspect", name) == f"error: {name}: not there"


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", b"no table at all"])
def test_a_file_that_only_looks_like_a_shard(tmp_path: Path, content: bytes) -> None:
    desk = desk_at(tmp_path)
    desk.write("lone.arrow", content)
    desk.write("lone.zarr/zarr.json", content)
    assert "lone.arrow: not a whole Arrow file: " in desk.refused("inspect", "lone.arrow")
    assert "lone.zarr: not a whole Zarr group: " in desk.refused("inspect", "lone.zarr")


def test_any_other_file_is_refused(alone: Desk) -> None:
    alone.write("notes.txt", "a")
    line = alone.refused("inspect", "notes.txt")
    assert line == "error: notes.txt: a file, but no shard (*.arrow, *.zarr)"


def test_a_store_may_be_called_like_a_shard(tmp_path: Path) -> None:
    write_store(tmp_path / "s.arrow")
    assert told(desk_at(tmp_path), "s.arrow")["sequences"] == SEQUENCES


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"forward": 3, "machine": 4, "capture_tokens_per_second": "fast"}']
)
def test_measurements_are_no_part_of_the_record(alone: Desk, content: str) -> None:
    alone.write("s/measurements.json", content)
    assert "speed" not in alone.done("inspect", "s").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["--positions", "0:4"],
        ["--top", "3"],
        ["--count", "3"],
        ["--count", "3", "--sequence", "1"],
        ["--html", "p.html", "--sequence", "1", "--count", "3"],
        ["--sequence", "one"],
        ["--sequence", "1", "--top", "0"],
        ["--sequence", "1", "--positions", "4"],
        ["--sequence", "1", "--positions", "4:4"],
        ["--sequence", "1", "--positions", "-4:4"],
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_together(alone: Desk, arguments: list[str]) -> None:
    before = alone.snapshot()
    result = alone.coldstill("inspect", "s", *arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert alone.snapshot() == before


def test_an_address_is_looked_at_like_a_folder() -> None:
    pytest.importorskip("fsspec")
    url = "memory://inspected/s"
    block = random_block(2, 6)
    write_missing(url, manifest_for(block), block)
    runner = CliRunner()
    store = json.loads(runner.invoke(main, ["inspect", url, "--json"]).stdout)
    assert (store["path"], store["positions"]) == (url, len(block.targets))
    shard = runner.invoke(main, ["inspect", f"{url}/shards/00001.arrow", "--json"])
    assert json.loads(shard.stdout)["rows"] == [4, 6]
    result = runner.invoke(main, ["inspect", f"{url}/shards/00007.arrow"])
    assert result.stderr.endswith("the store memory://inspected/s has no commit record of it\n")
    listed = json.loads(runner.invoke(main, ["inspect", url, "--sequence", "3", "--json"]).stdout)
    assert listed["sequences"][0]["note"].endswith("ids are shown instead of text")
    assert store["manifest"]["tokenizer"]["size"] == VOCABULARY


def test_missing_shards_are_told_in_ranges() -> None:
    assert ranges([0, 1, 2, 3, 7]) == "0-3, 7"
    assert ranges([5]) == "5"
    assert ranges([1, 2, 4, 5]) == "1-2, 4-5"
