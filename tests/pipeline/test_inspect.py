"""`coldstill inspect`: the facts of a store, a run or a shard, and the texts of tokens."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from coldstill.data.formats import STORES
from coldstill.data.ragged import Ragged
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.data.token_bytes import TokenBytes
from coldstill.pipeline.cli.commands import main
from coldstill.pipeline.pages.inspect.store import ranges
from coldstill.pipeline.pages.inspect.text import ASCII, BLOCKS, cell, glyphs_for, histogram
from coldstill.pipeline.results.token_texts import TokenTexts, token_texts
from inspected import TOKENS, desk_at, shown, write_store
from oracles import VOCABULARY, manifest_for, random_block, write_missing
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from pathlib import Path

    from desk import Desk

pytest_plugins = ("desk", "inspect_fixtures")


@pytest.mark.slow
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
    block = write_store(tmp_path / "s.arrow")  # a store may have the name of a shard
    facts = shown(desk_at(tmp_path), "s.arrow")
    targets, count = block.targets, len(block.targets)
    loss = -targets.label_logprob.astype(np.float64).mean()
    mass_M = np.exp(targets.head_logprobs.astype(np.float64)).sum(1)
    assert facts["teacher_loss"] == pytest.approx(loss, rel=1e-6)
    assert facts["teacher_perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert facts["teacher_entropy"] == pytest.approx(targets.entropy.mean(), rel=1e-6)
    assert facts["head_mass"] == pytest.approx(mass_M.mean(), rel=1e-6)
    for name, values in (("entropy", targets.entropy), ("head_mass", mass_M)):
        bins = facts["histograms"][name]
        assert sum(bins["positions"]) == count
        assert bins["positions"] == np.histogram(values, [*bins["from"], np.inf])[0].tolist()
    write_store(tmp_path / "s", Capture(head=0, tail=6))
    text = desk_at(tmp_path).done("inspect", "s").stdout
    assert "top-1" not in text
    assert "inside the head" not in text
    assert shown(desk_at(tmp_path), "s")["teacher_accuracy"] is None
    write_store(tmp_path / "c", codec="compact")
    store = open_store(tmp_path / "c")
    facts = shown(desk_at(tmp_path), "c")
    assert facts["codec_kl"] == store.statistics.distortion / store.positions > 0
    text = desk_at(tmp_path).done("inspect", "c").stdout
    assert "codec       compact, levels 127" in text
    assert f"mean KL {facts['codec_kl']:.2g} nats a position" in text


@pytest.mark.slow
def test_inspect_prints_aligned_rows_and_a_run_means_its_store(finished: Desk) -> None:
    before = finished.snapshot()
    lines = finished.done("inspect", "runs/r/heldout").stdout.splitlines()
    rows = {line[:11].strip(): line[12:] for line in lines if line[:1].isalpha()}
    names = "store teacher tokenizer corpus packing capture codec shards holds size error quality"
    assert list(rows)[:12] == names.split()
    for name, start in (
        ("teacher", "teacher (llama, "),
        ("tokenizer", "320 tokens"),
        ("capture", "head 16, tail 8, temperatures 1.0"),
        ("error", "none, "),
    ):
        assert rows[name].startswith(start)
    assert rows["store"] == "runs/r/heldout (arrow, zstd 0)"
    assert rows["packing"] == "up to 32 tokens, documents packed together, kept apart by positions"
    assert rows["codec"] == "plain"
    assert rows["shards"].endswith(", complete")
    assert max(map(len, lines)) <= 100
    assert "\u2588" in "".join(lines)
    facts = shown(finished, "runs/r")
    assert facts["note"] == (
        "runs/r is a run; its store runs/r/logits is shown; it also has runs/r/heldout"
    )
    assert {**facts, "note": ""} == shown(finished, "runs/r/logits")
    assert finished.done("inspect", "runs/r/").stdout.startswith("runs/r/ is a run; ")
    finished.done("inspect", "runs/r", "--sequence", "1")
    assert finished.snapshot() == before


def test_histograms_and_cells_fit_the_terminal(alone: Desk) -> None:
    arguments = ["inspect", str(alone.root / "s")]
    plain = CliRunner(charset="ascii").invoke(main, arguments)
    assert plain.exit_code == 0
    assert plain.stdout.isascii()
    assert "##" in plain.stdout
    assert not CliRunner().invoke(main, arguments).stdout.isascii()
    assert (glyphs_for("utf-8"), glyphs_for("cp1252")) == (BLOCKS, ASCII)
    assert (glyphs_for(None), glyphs_for("no such encoding")) == (ASCII, ASCII)
    lines = histogram([0, 1, 500, 1000], BLOCKS, height=2, width=1)
    assert lines == ["   \u2588", " \u2581\u2588\u2588"]
    assert histogram([0, 0], ASCII, height=1) == ["    "]
    assert cell("abc", 5) == "abc  "
    assert cell("abcdef", 5) == "ab..."
    assert cell("\u65e5\u672c", 5) == "\u65e5\u672c "  # two columns each
    assert cell("e\u0301", 2) == "e\u0301 "  # an accent takes none


def test_inspect_names_missing_shards(alone: Desk) -> None:
    for index in (0, 2):
        (alone.root / "s" / "shards" / f"{index:05d}.json").unlink()
    facts = shown(alone, "s")
    assert (facts["shards"], facts["shards_done"], facts["shards_missing"]) == (3, 1, [0, 2])
    assert facts["sequences"] == 4
    assert "1 of 3, missing 0, 2\n" in alone.done("inspect", "s").stdout
    assert [ranges(rows) for rows in ([0, 1, 2, 3, 7], [1, 2, 4, 5])] == ["0-3, 7", "1-2, 4-5"]


def test_inspect_shows_a_store_without_shards(alone: Desk) -> None:
    for record in (alone.root / "s" / "shards").glob("*.json"):
        record.unlink()
    text = alone.done("inspect", "s").stdout
    assert "0 sequences" in text
    assert "perplexity" not in text
    assert "positions by" not in text
    assert shown(alone, "s")["teacher_perplexity"] is None
    assert "has no sequence yet" in alone.refused("inspect", "s", "--html", "p.html")
    # damaged measurements are ignored
    wrong = '{"forward": 3, "machine": 4, "capture_tokens_per_second": "fast"}'
    for content in ("{", "[]", wrong):
        alone.write("s/measurements.json", content)
        assert "speed" not in alone.done("inspect", "s").stdout
    alone.write("notes.txt", "a")
    line = alone.refused("inspect", "notes.txt")
    assert line == "error: notes.txt: a file that is not a shard (*.arrow, *.zarr)"


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


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", list(STORES))
def test_one_shard_is_shown_as_part_of_its_store(tmp_path: Path, store: str, codec: str) -> None:
    write_store(tmp_path / "s", store=store, codec=codec)
    desk, name = desk_at(tmp_path), f"s/shards/00002{STORES[store].suffix}"
    facts = shown(desk, name)
    part = open_store(tmp_path / "s").read(np.arange(8, 10))
    assert (facts["shard"], facts["rows"], facts["sequences"]) == (2, [8, 10], 2)
    assert facts["positions"] == len(part.targets)
    loss = -part.targets.label_logprob.mean()
    assert facts["teacher_loss"] == pytest.approx(loss, abs=0.01)
    assert sum(facts["histograms"]["entropy"]["positions"]) == len(part.targets)
    columns = {column["name"]: column for column in facts["columns"]}
    whole, stored = len(part.sequences.tokens.values), columns["token_ids"]["values"]
    assert 0 < stored <= whole  # compact leaves out labels that are in their records
    if codec == "plain":
        assert stored == whole
    assert columns["entropy"]["values"] == len(part.targets)
    text = desk.done("inspect", name).stdout
    assert "this shard  2: sequences 8 to 9; all lines below are about it alone" in text


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("store", list(STORES))
def test_a_shard_without_a_manifest_shows_its_columns(
    tmp_path: Path, store: str, codec: str
) -> None:
    block = write_store(tmp_path / "s", store=store, codec=codec)
    suffix = STORES[store].suffix
    shard, lone = tmp_path / "s" / "shards" / f"00000{suffix}", tmp_path / f"lone{suffix}"
    (shutil.copytree if shard.is_dir() else shutil.copy)(shard, lone)
    desk = desk_at(tmp_path)
    facts = shown(desk, lone.name)
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


def test_a_shard_that_is_missing_or_not_committed_is_named(alone: Desk) -> None:
    for folder, name in (("s/shards", "00002.arrow"), ("s", "shards/00002.arrow")):
        assert shown(desk_at(alone.root / folder), name)["rows"] == [8, 10]
    for name in ("lone.arrow", "s/shards/00009.arrow", "lone.zarr"):
        assert alone.refused("inspect", name) == f"error: {name}: does not exist"
    (alone.root / "s" / "shards" / "00001.json").unlink()
    facts = shown(alone, "s/shards/00001.arrow")
    assert facts["note"].startswith("the store s has no commit record of it")
    assert "manifest" not in facts
    for content in (b"", b"ARROW1\0\0", b"no table at all"):
        alone.write("lone.arrow", content)
        alone.write("lone.zarr/zarr.json", content)
        assert "lone.arrow: not a whole Arrow file: " in alone.refused("inspect", "lone.arrow")
        assert "lone.zarr: not a whole Zarr group: " in alone.refused("inspect", "lone.zarr")


TEXT = "one two\n\n    three\tna\u00efve \u65e5\u672c \U0001f600 \u0394"


def words(tokens: list[str], decoder: Any = None) -> TokenTexts:
    """Texts of a tokenizer with exactly this table."""
    model: Any = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0])
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    return TokenTexts(TokenBytes(tokenizer))


def test_tokens_of_bytes_put_together_are_the_text() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(["one two three one two three"], trainer)
    texts = TokenTexts(TokenBytes(tokenizer))
    ids = tokenizer.encode(TEXT).ids
    # what is no whole character is a byte, seen as one: all of the text is still there
    together = "".join(texts.of(index) for index in ids)
    assert together == TEXT.encode().decode("ascii", "backslashreplace")
    assert tokenizer.id_to_token(0) == texts.of(0) == "<|end|>"


def test_blanks_bytes_and_invisible_characters_are_visible() -> None:
    parts = [
        decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]  # fmt: skip
    for decoder in (decoders.Metaspace(), decoders.Sequence(parts)):
        texts = words(["\u2581the", "\u2581\u2581", "the", "\u2581"], decoder)
        assert [texts.of(i) for i in range(4)] == [" the", "  ", "the", " "]
    fallback = words(["<0x0A>", "<0xE2>", "<0x41>"], decoders.Sequence([decoders.ByteFallback()]))
    assert [fallback.of(i) for i in range(3)] == ["\n", "\\xe2", "A"]
    assert words(["<0x0A>"]).of(0) == "<0x0A>"  # this tokenizer has no such bytes
    escaped = {
        "\x1b[31m": "\\x1b[31m", "\u202e": "\\u202e", "\u2028": "\\u2028", "\r": "\\r",
        "\x00": "\\x00", "\u200b": "\\u200b", "\xa0": "\\xa0", "\ue000": "\\ue000",
        "": '""', "\ufeff": "\\ufeff",
    }  # fmt: skip
    texts = words(list(escaped))
    assert [texts.of(i) for i in range(len(escaped))] == list(escaped.values())


def test_an_added_token_is_its_content_and_an_unknown_id_its_number() -> None:
    model: Any = models.WordLevel({"a": 0}, unk_token="a")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<\u2581\u0120>")])
    texts = TokenTexts(TokenBytes(tokenizer))
    assert texts.of(1) == "<\u2581\u0120>"
    assert texts.of(7) == "#7"
    assert not texts.lack


def test_a_store_without_a_tokenizer_shows_ids(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    store = open_store(tmp_path / "s")
    assert token_texts(store).of(9) == TOKENS[9]
    (store.tokenizer_folder() / "tokenizer.json").write_text("{", encoding="utf-8")
    damaged = token_texts(store)
    assert damaged.of(9) == "#9"
    assert "tokenizer.json: " in damaged.lack
    assert damaged.lack.endswith(": ids are shown instead of text")
    (store.tokenizer_folder() / "tokenizer.json").unlink()
    missing = token_texts(store)
    assert missing.of(9) == "#9"
    assert missing.lack == "no tokenizer.json in the store: ids are shown instead of text"


def test_a_token_is_visible_on_every_terminal() -> None:
    assert BLOCKS.visible(" a\n\tb") == "\u00b7a\u21b5\u21e5b"
    assert ASCII.visible(" a\n\tb\u65e5") == '" a\\n\\tb\\u65e5"'
    assert all(ASCII.visible(token).isascii() for token in np.array(TOKENS))
