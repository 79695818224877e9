"""What a store, a run or a shard says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.pipeline.cli.commands import main
from coldstill.pipeline.pages.inspect.store import ranges
from coldstill.pipeline.pages.inspect.text import ASCII, BLOCKS, cell, glyphs_for, histogram
from inspected import SEQUENCES, desk_at, shown, write_store
from oracles import VOCABULARY, manifest_for, random_block, write_missing

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk", "inspect_fixtures")


def test_inspect_shows_the_content_of_a_store(finished: Desk) -> None:
    store = open_store(finished.run / "logits")
    block = next(iter(store.batches(len(store))))
    facts = shown(finished, "runs/r/logits")
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
    facts = shown(desk_at(tmp_path), "s")
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


def test_the_codecs_kl_is_a_mean_over_all_positions(tmp_path: Path) -> None:
    write_store(tmp_path / "s", codec="compact")
    store = open_store(tmp_path / "s")
    facts = shown(desk_at(tmp_path), "s")
    assert facts["codec_kl"] == store.statistics.distortion / store.positions > 0
    text = desk_at(tmp_path).done("inspect", "s").stdout
    assert "codec       compact, levels 127" in text
    assert f"mean KL {facts['codec_kl']:.2g} nats a position" in text


def test_inspect_prints_aligned_rows(finished: Desk) -> None:
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


def test_a_run_means_its_store(finished: Desk) -> None:
    facts = shown(finished, "runs/r")
    assert facts["note"] == (
        "runs/r is a run; its store runs/r/logits is shown; it also has runs/r/heldout"
    )
    assert {**facts, "note": ""} == shown(finished, "runs/r/logits")
    assert finished.done("inspect", "runs/r/").stdout.startswith("runs/r/ is a run; ")


def test_histograms_are_ascii_if_blocks_cannot_be_shown(alone: Desk) -> None:
    arguments = ["inspect", str(alone.root / "s")]
    plain = CliRunner(charset="ascii").invoke(main, arguments)
    assert plain.exit_code == 0
    assert plain.stdout.isascii()
    assert "##" in plain.stdout
    assert not CliRunner().invoke(main, arguments).stdout.isascii()
    assert (glyphs_for("utf-8"), glyphs_for("cp1252")) == (BLOCKS, ASCII)
    assert (glyphs_for(None), glyphs_for("no such encoding")) == (ASCII, ASCII)


def test_a_bar_is_as_high_as_its_count() -> None:
    lines = histogram([0, 1, 500, 1000], BLOCKS, height=2, width=1)
    assert lines == ["   \u2588", " \u2581\u2588\u2588"]
    assert histogram([0, 0], ASCII, height=1) == ["    "]


def test_a_cell_has_its_width() -> None:
    assert cell("abc", 5) == "abc  "
    assert cell("abcdef", 5) == "ab..."
    assert cell("\u65e5\u672c", 5) == "\u65e5\u672c "  # two columns each
    assert cell("e\u0301", 2) == "e\u0301 "  # an accent takes none


def test_without_a_head_its_figures_are_omitted(tmp_path: Path) -> None:
    write_store(tmp_path / "s", Capture(head=0, tail=6))
    text = desk_at(tmp_path).done("inspect", "s").stdout
    assert "top-1" not in text
    assert "inside the head" not in text
    assert shown(desk_at(tmp_path), "s")["teacher_accuracy"] is None


def test_inspect_names_missing_shards(alone: Desk) -> None:
    for index in (0, 2):
        (alone.root / "s" / "shards" / f"{index:05d}.json").unlink()
    facts = shown(alone, "s")
    assert (facts["shards"], facts["shards_done"], facts["shards_missing"]) == (3, 1, [0, 2])
    assert facts["sequences"] == 4
    assert "1 of 3, missing 0, 2\n" in alone.done("inspect", "s").stdout


def test_inspect_shows_a_store_without_shards(alone: Desk) -> None:
    for record in (alone.root / "s" / "shards").glob("*.json"):
        record.unlink()
    text = alone.done("inspect", "s").stdout
    assert "0 sequences" in text
    assert "says" not in text
    assert "positions by" not in text
    assert shown(alone, "s")["teacher_perplexity"] is None
    assert "has no sequence yet" in alone.refused("inspect", "s", "--html", "p.html")


def test_inspect_changes_nothing(finished: Desk) -> None:
    before = finished.snapshot()
    finished.done("inspect", "runs/r/logits")
    finished.done("inspect", "runs/r", "--sequence", "1")
    finished.done("inspect", "runs/r/heldout", "--json")
    assert finished.snapshot() == before


def test_any_other_file_is_refused(alone: Desk) -> None:
    alone.write("notes.txt", "a")
    line = alone.refused("inspect", "notes.txt")
    assert line == "error: notes.txt: a file that is not a shard (*.arrow, *.zarr)"


def test_a_store_can_have_the_name_of_a_shard(tmp_path: Path) -> None:
    write_store(tmp_path / "s.arrow")
    assert shown(desk_at(tmp_path), "s.arrow")["sequences"] == SEQUENCES


def test_damaged_measurements_are_ignored(alone: Desk) -> None:
    wrong = '{"forward": 3, "machine": 4, "capture_tokens_per_second": "fast"}'
    for content in ("{", "[]", wrong):
        alone.write("s/measurements.json", content)
        assert "speed" not in alone.done("inspect", "s").stdout


def test_options_that_do_not_fit_together_are_refused(alone: Desk) -> None:
    before = alone.snapshot()
    for line in (
        "--positions 0:4",
        "--top 3",
        "--count 3",
        "--count 3 --sequence 1",
        "--html p.html --sequence 1 --count 3",
        "--sequence one",
        "--sequence 1 --top 0",
        "--sequence 1 --positions 4",
        "--sequence 1 --positions 4:4",
        "--sequence 1 --positions -4:4",
    ):
        result = alone.coldstill("inspect", "s", *line.split())
        assert result.exit_code == 2, line
        assert "Error: " in result.stderr
    assert alone.snapshot() == before


def test_reading_tokens_needs_no_deep_learning(alone: Desk) -> None:
    program = (
        "import sys\n"
        "from coldstill.pipeline.cli import main\n"
        "for view in (['--sequence', '0'], ['--html', 'p.html']):\n"
        "    try:\n        main(['inspect', 's', *view])\n"
        "    except SystemExit as end:\n        assert not end.code, end.code\n"
        "print(*{'torch', 'transformers', 'accelerate'} & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=alone.root, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == ""


def test_an_address_is_inspected_like_a_folder() -> None:
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


def test_missing_shards_are_listed_as_ranges() -> None:
    assert ranges([0, 1, 2, 3, 7]) == "0-3, 7"
    assert ranges([5]) == "5"
    assert ranges([1, 2, 4, 5]) == "1-2, 4-5"
