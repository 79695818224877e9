"""One sequence, position by position: compared with the block that was stored."""

from __future__ import annotations

import io
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.pipeline.cli.commands import main
from coldstill.pipeline.pages.inspect.text import clip, percent
from inspected import LONG, SEQUENCES, TOKENS, desk_at, shown, write_store
from oracles import FULL, VOCABULARY, draws, known_draws

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.schema import Block
    from desk import Desk

pytest_plugins = ("desk", "inspect_fixtures")


def listed(desk: Desk, row: int, *arguments: str) -> Any:
    """One sequence as JSON."""
    return shown(desk, "s", "--sequence", str(row), *arguments)["sequences"][0]


def test_every_position_has_its_own_target(alone: Desk, block: Block) -> None:
    options = [part for row in range(SEQUENCES) for part in ("--sequence", str(row))]
    for row, sequence in enumerate(shown(alone, "s", *options, "--top", "3")["sequences"]):
        _compare(block, row, sequence["positions"])
    ascii_only = CliRunner(charset="ascii").invoke(
        main, ["inspect", str(alone.root / "s"), *options]
    )
    assert ascii_only.exit_code == 0
    assert ascii_only.stdout.isascii()
    tokens, positions = block.sequences.tokens, block.sequences.positions
    pairs = [(tokens[i][positions[i]], tokens[i][positions[i] + 1]) for i in range(SEQUENCES)]
    here, following = (np.concatenate(side) for side in zip(*pairs, strict=True))
    assert (here != following).mean() > 0.9  # so a wrong shift would be noticed


def _compare(block: Block, row: int, entries: list[Any]) -> None:
    one = block.take(np.array([row]))
    tokens = one.sequences.tokens[0].tolist()
    positions = one.sequences.positions[0].tolist()
    assert [entry["token"] for entry in entries] == tokens
    assert [entry["text"] for entry in entries if "\x1b" not in TOKENS[entry["token"]]]
    assert [e["position"] for e in entries if e["target"] is not None] == positions
    starts = one.sequences.document_starts[0].tolist()
    assert [e["position"] for e in entries if e["starts_document"]] == starts
    documents = dict(zip(starts, one.sequences.document_ids[0].tolist(), strict=True))
    for entry in entries:
        begun = max(start for start in starts if start <= entry["position"])
        assert entry["document"] == documents[begun]
    targets = one.targets
    for place, position in enumerate(positions):
        found = entries[position]["target"]
        assert found["label"] == tokens[position + 1]
        assert found["label_logprob"] == targets.label_logprob[place]
        assert found["surprise"] == -targets.label_logprob[place]
        assert found["label_probability"] == pytest.approx(np.exp(targets.label_logprob[place]))
        assert found["entropy"] == targets.entropy[place]
        assert found["tail_mass"] == pytest.approx(np.exp(targets.log_tail[place]), rel=1e-5)
        assert found["head_mass"] + found["tail_mass"] == pytest.approx(1.0, abs=1e-5)
        best = [(guess["token"], guess["probability"]) for guess in found["best"]]
        assert [token for token, _ in best] == targets.head_ids[place, :3].tolist()
        assert [p for _, p in best] == pytest.approx(np.exp(targets.head_logprobs[place, :3]))
        rank = found["rank"]
        at = np.flatnonzero(targets.head_ids[place] == found["label"])
        assert (rank is None and not len(at)) or rank == at[0] + 1
        samples = {sample["token"]: sample["count"] for sample in found["samples"]}
        drawn_R = draws(targets.tail)[place].tolist()
        assert samples == Counter(drawn_R)
        known = dict(zip(drawn_R, known_draws(targets.tail)[place], strict=True))
        for sample in found["samples"]:
            assert sample["probability"] == pytest.approx(np.exp(known[sample["token"]]))


def test_the_text_agrees_with_the_json(alone: Desk) -> None:
    text = alone.done("inspect", "s", "--sequence", str(LONG)).stdout
    sequence = listed(alone, LONG)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {int(m[1]): line for line in lines if (m := re.match(r" {0,5}(\d+)  \S", line))}
    assert list(rows) == [entry["position"] for entry in sequence["positions"]]
    for entry in sequence["positions"]:
        line, target = rows[entry["position"]], entry["target"]
        assert f"  {seen(entry['text'])}  " in line
        if target is None:
            assert line.endswith("  -")
            continue
        rank = "-" if target["rank"] is None else str(target["rank"])
        assert line.split()[-4:] == [
            percent(target["label_probability"]),
            f"{target['surprise']:.2f}",
            rank,
            f"{target['entropy']:.2f}",
        ]
        after = "\n".join(lines[lines.index(line) + 1 :])
        best, _, rest = after.partition("head ")
        for guess in target["best"]:
            mark = "\u25b8" if guess["token"] == target["label"] else ""
            assert f"{mark}{seen(guess['text'])} {percent(guess['probability'])}" in best
        masses = f"{percent(target['head_mass'])}, tail {percent(target['tail_mass'])}: "
        assert rest.startswith(masses)
        for sample in target["samples"]:
            often = f" \u00d7{sample['count']}" if sample["count"] > 1 else ""
            assert f"{seen(sample['text'])}{often}" in rest
    borders = [line for line in lines if line.startswith("\u2500\u2500 document ")]
    assert len(borders) == sum(entry["starts_document"] for entry in sequence["positions"])
    assert "\x1b" not in text


def seen(text: str) -> str:
    """A token with its blanks seen, as far as there is room."""
    return clip(text.replace(" ", "\u00b7").replace("\n", "\u21b5").replace("\t", "\u21e5"), 22)


def test_the_text_shows_the_given_sequences_and_positions(alone: Desk) -> None:
    whole = listed(alone, LONG)["positions"]
    assert len(whole) > 5
    for given, part in (
        ("2:4", whole[2:4]), (":3", whole[:3]), ("3:", whole[3:]), ("2:999", whole[2:]),
    ):  # fmt: skip
        assert listed(alone, LONG, "--positions", given)["positions"] == part
    text = alone.done("inspect", "s", "--sequence", str(LONG), "--positions", "2:4").stdout
    assert "; shown are 2 to 3" in " ".join(text.split())
    line = alone.refused("inspect", "s", "--sequence", str(LONG), "--positions", "50:60")
    assert line == f"error: s: sequence {LONG} has {len(whole)} positions, none from 50 on"
    both = ("--sequence", "4", "--sequence", "0")
    assert [one["sequence"] for one in shown(alone, "s", *both)["sequences"]] == [4, 0]
    text = alone.done("inspect", "s", *both).stdout
    assert text.index("sequence 4 of s") < text.index("sequence 0 of s")
    (alone.root / "s" / "tokenizer" / "tokenizer.json").unlink()
    sequence = listed(alone, 0)
    assert sequence["note"] == "no tokenizer.json in the store: ids are shown instead of text"
    assert {e["text"] == f"#{e['token']}" for e in sequence["positions"]} == {True}
    assert sequence["note"] in alone.done("inspect", "s", "--sequence", "0").stdout
    values = (1.0, 0.731, 0.0731, 0.0001, 0.00004, 1e-9, 0.0)
    percents = "100.0% 73.1% 7.31% 0.01% 0.004% <0.001% 0%"
    assert [percent(value) for value in values] == percents.split()


def test_a_missing_sequence_is_refused(alone: Desk) -> None:
    shard = "s/shards/00001.arrow"
    alone.done("inspect", shard, "--sequence", "5")
    line = alone.refused("inspect", shard, "--sequence", "8")
    assert line == f"error: {shard}: no sequence 8; this shard holds 4 to 7"
    for row in (-1, SEQUENCES, 10**30):
        line = alone.refused("inspect", "s", "--sequence", str(row))
        assert line == f"error: s: no sequence {row}; its sequences are 0 to 9"
    (alone.root / "s" / "shards" / "00001.json").unlink()
    line = alone.refused("inspect", "s", "--sequence", "5")
    assert line.startswith("error: s: sequence 5 is in shard 1, which is missing; finish the store")
    assert listed(alone, 8)["positions"]


@pytest.mark.parametrize(
    "capture",
    [Capture(head=0, tail=5), Capture(head=6, tail=0), Capture(head=VOCABULARY, tail=0)],
    ids=["no head", "no tail", "everything"],
)
def test_a_capture_without_head_or_tail_is_shown(tmp_path: Path, capture: Capture) -> None:
    write_store(tmp_path / "s", capture)
    desk = desk_at(tmp_path)
    targets = [e["target"] for e in listed(desk, LONG)["positions"] if e["target"]]
    assert targets
    for target in targets:
        assert len(target["best"]) == min(5, capture.head)
        assert sum(sample["count"] for sample in target["samples"]) == capture.tail
        assert {sample["probability"] for sample in target["samples"]} <= {None}
    text = desk.done("inspect", "s", "--sequence", str(LONG)).stdout
    if capture.head == VOCABULARY:
        assert "head 100.0%, tail 0%" in text


def test_a_compact_zarr_store_gives_the_same_within_its_error(tmp_path: Path) -> None:
    exact = write_store(tmp_path / "exact")
    write_store(tmp_path / "s", codec="compact", store="zarr")
    maximum = open_store(tmp_path / "s").manifest.make_codec("s").maximum_error(FULL)
    positions = [e for e in listed(desk_at(tmp_path), LONG)["positions"] if e["target"]]
    one = exact.take(np.array([LONG]))
    for place, entry in enumerate(positions):
        wanted = dict(
            zip(
                one.targets.head_ids[place].tolist(),
                np.exp(one.targets.head_logprobs[place] / 2),
                strict=True,
            )
        )
        for guess in entry["target"]["best"]:
            assert abs(np.sqrt(guess["probability"]) - wanted[guess["token"]]) <= maximum


def test_long_text_goes_through_a_pager_on_a_terminal(
    alone: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    paged: list[str] = []
    monkeypatch.setattr(click, "echo_via_pager", paged.append)
    arguments = ["inspect", str(alone.root / "s"), "--sequence", str(LONG)]
    for output, height, pages in ((Terminal(), 500, 0), (Terminal(), 5, 1), (io.StringIO(), 5, 1)):
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setenv("LINES", str(height))
        main(arguments, standalone_mode=False)
        assert len(paged) == pages
        assert bool(output.getvalue()) != (isinstance(output, Terminal) and height == 5)
    assert f"sequence {LONG} of" in paged[0]
