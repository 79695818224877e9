"""The page, read as a browser's parser reads it: whole, harmless, and true to the store."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill
import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.schema import Capture
from coldstill.data.store.reader import open_store
from coldstill.pipeline.results.token_texts import token_texts
from inspected import LONG, SEQUENCES, desk_at, shown, write_store
from oracles import draws

if TYPE_CHECKING:
    from coldstill.data.schema import Block
    from desk import Desk

pytest_plugins = ("desk", "inspect_fixtures")

TEMPLATES = Path(coldstill.__file__).parent / "pipeline" / "pages" / "inspect" / "templates"


class Page(HTMLParser):
    """Every tag of a page, and what stands inside its scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, str] = {}
        self._open = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        self._open = f"{tag} {given.get('type') or ''}".strip()

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open] = self.inside.get(self._open, "") + data

    @property
    def data(self) -> Any:
        """The JSON that the page carries."""
        return json.loads(self.inside["script application/json"])


def written(desk: Desk, *arguments: str) -> Page:
    """The page that a command writes."""
    desk.done("inspect", "s", "--html", "p.html", *arguments)
    return Page((desk.root / "p.html").read_text(encoding="utf-8"))


def test_a_page_is_a_single_file(alone: Desk) -> None:
    page = written(alone)
    names = [tag for tag, _ in page.tags]
    assert not {"link", "img", "iframe", "object", "embed", "base", "source"} & set(names)
    for tag, attributes in page.tags:
        assert not {"src", "href", "action", "srcset", "style"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    content = {a.get("http-equiv"): a.get("content") or "" for t, a in page.tags if t == "meta"}
    policy = content["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    for tag in ("style", "script"):
        digest = hashlib.sha256(page.inside[tag].encode()).digest()
        assert f"{tag}-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "unsafe" not in policy
    for part in ("style", "script"):
        urls = re.findall(r"url\(|@import|https?://[^\s\"')]+", page.inside[part])
        assert set(urls) <= {"http://www.w3.org/2000/svg"}  # a name, which nothing fetches


def test_the_text_of_tokens_is_escaped(alone: Desk, block: Block) -> None:
    page = written(alone)
    outline = Page((TEMPLATES / "inspect.html").read_text(encoding="utf-8"))
    # the tags are those of the outline, for any tokens
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in outline.tags]
    texts = token_texts(open_store(alone.root / "s"))
    texts_shown = set(page.data["texts"].values())
    used = {texts.of(int(token)) for token in block.sequences.tokens.values}
    assert {"<img src=x onerror=alert(1)>", "</script>", "@@SCRIPT@@", "\\x1b[31m"} <= texts_shown
    assert used <= texts_shown
    scripts = [(TEMPLATES / f"inspect_{part}.js").read_text() for part in ("text", "panel")]
    assert page.inside["script"] == "\n".join(scripts)


def test_the_data_are_those_of_the_store(alone: Desk, block: Block) -> None:
    data = written(alone, "--count", "99", "--top", "3").data
    assert [sequence["row"] for sequence in data["sequences"]] == list(range(SEQUENCES))
    for row, sequence in enumerate(data["sequences"]):
        one = block.take(np.array([row]))
        assert sequence["tokens"] == one.sequences.tokens[0].tolist()
        starts, ids = one.sequences.document_starts[0], one.sequences.document_ids[0]
        assert sequence["documents"] == np.stack([starts, ids], 1).tolist()
        positions = one.sequences.positions[0].tolist()
        assert [prediction[1] for prediction in sequence["predictions"]] == positions
        for i, target in enumerate(sequence["predictions"]):
            place, position, surprise, entropy, rank, head_mass, tail_mass, head, samples = target
            # the token is coloured by what was stored one position before it
            assert place == position + 1
            assert sequence["tokens"][place] == labels(one.sequences)[i]
            assert surprise == pytest.approx(-one.targets.label_logprob[i], abs=1e-4)
            assert entropy == pytest.approx(one.targets.entropy[i], abs=1e-3)
            assert tail_mass == pytest.approx(np.exp(one.targets.log_tail[i]), rel=1e-3)
            assert head_mass + tail_mass == pytest.approx(1.0, abs=1e-3)
            ids = one.targets.head_ids[i].tolist()
            assert head[::2] == ids[:3]
            assert head[1::2] == pytest.approx(np.exp(one.targets.head_logprobs[i, :3]), rel=1e-3)
            label = sequence["tokens"][place]
            assert rank == (ids.index(label) + 1 if label in ids else 0)
            drawn = np.repeat(samples[::2], samples[1::2]).tolist()
            assert sorted(drawn) == draws(one.targets.tail)[i].tolist()


def test_the_summary_is_that_of_the_store(alone: Desk) -> None:
    data = written(alone).data
    text = " ".join(alone.done("inspect", "s").stdout.split())
    for name, value in data["table"]:
        assert f"{name} {value}" in text
    facts = shown(alone, "s")
    for one, key in zip(data["histograms"], ("entropy", "head_mass"), strict=True):
        assert one["counts"] == facts["histograms"][key]["positions"]
        assert len(one["bins"]) == len(one["counts"])
        assert 0 <= one["mean"] <= 1
    assert data["histograms"][0]["mean"] == pytest.approx(facts["teacher_entropy"] / 12)


def test_a_page_shows_a_fixed_sample_or_the_chosen_positions(alone: Desk) -> None:
    alone.write("p.html", "what was here before")
    first = written(alone, "--count", "4").data["sequences"]
    page = (alone.root / "p.html").read_bytes()
    rows = [sequence["row"] for sequence in first]
    assert rows == sorted(set(rows))
    assert len(rows) == 4
    written(alone, "--count", "4")
    assert (alone.root / "p.html").read_bytes() == page, "the same store gives the same page"
    chosen = written(alone, "--sequence", "7", "--sequence", "2").data["sequences"]
    assert [sequence["row"] for sequence in chosen] == [7, 2]
    row = ("--sequence", str(LONG))
    (whole,) = written(alone, *row).data["sequences"]
    (part,) = written(alone, *row, "--positions", "3:8").data["sequences"]
    assert (part["first"], part["length"]) == (3, whole["length"])
    assert part["tokens"] == whole["tokens"][3:8]
    # the token at place 3 keeps its target, though position 2, where it is stored, is not shown
    assert part["predictions"] == [b for b in whole["predictions"] if 3 <= b[0] < 8]
    (alone.root / "folder").mkdir()
    line = alone.refused("inspect", "s", "--html", "folder")
    assert line == "error: folder: a folder; name the file that the page is to be"
    (alone.root / "s" / "tokenizer" / "tokenizer.json").unlink()
    data = written(alone).data
    assert "ids are shown instead of text" in data["note"]
    assert all(text == f"#{token}" for token, text in data["texts"].items())


def test_only_finished_shards_are_sampled(alone: Desk) -> None:
    (alone.root / "s" / "shards" / "00001.json").unlink()
    data = written(alone).data
    assert [sequence["row"] for sequence in data["sequences"]] == [0, 1, 2, 3, 8, 9]
    alone.done("inspect", "s/shards/00002.arrow", "--html", "p.html")
    page = Page((alone.root / "p.html").read_text(encoding="utf-8"))
    assert [sequence["row"] for sequence in page.data["sequences"]] == [8, 9]
    before = alone.snapshot()
    line = alone.refused("inspect", "s", "--html", "p.html", "--sequence", "5")
    assert "shard 1, which is missing" in line
    assert alone.snapshot() == before


@pytest.mark.slow
def test_the_command_reports_what_it_wrote(finished: Desk) -> None:
    facts = shown(finished, "runs/r", "--html", "out/p.html", "--count", "99")
    path = finished.root / "out" / "p.html"
    assert facts["wrote"] == os.path.join("out", "p.html")
    assert facts["bytes"] == path.stat().st_size
    sequences = Page(path.read_text(encoding="utf-8")).data["sequences"]
    assert facts["sequences"] == [sequence["row"] for sequence in sequences]
    assert facts["tokens"] == sum(len(sequence["tokens"]) for sequence in sequences)
    empty = sum(path.stat().st_size for path in TEMPLATES.iterdir())
    assert facts["tokens"] > 500
    assert (facts["bytes"] - empty) / facts["tokens"] < 300
    line = finished.done("inspect", "runs/r", "--html", "q.html", "--sequence", "0").stdout
    assert line.startswith("wrote q.html: 1 sequence, ")
    assert not list(finished.root.rglob(".unfinished-*"))


@pytest.mark.parametrize("capture", [Capture(head=0, tail=5), Capture(head=6, tail=0)])
def test_a_page_shows_a_capture_without_a_head_or_a_tail(tmp_path: Path, capture: Capture) -> None:
    write_store(tmp_path / "s", capture)
    data = written(desk_at(tmp_path)).data
    assert data["head"] == capture.head
    assert len(data["histograms"]) == (2 if capture.head else 1)
    predictions = [one for sequence in data["sequences"] for one in sequence["predictions"]]
    assert {len(prediction[7]) for prediction in predictions} == {2 * min(8, capture.head)}
    assert {sum(prediction[8][1::2]) for prediction in predictions} == {capture.tail}


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG has it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    """How far apart two colours are, from 1 to 21."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_readable_on_every_colour(theme: int) -> None:
    style = (TEMPLATES / "inspect.css").read_text(encoding="utf-8")
    found = re.findall(r"--([a-z]+\d*): (#[0-9a-f]{6})", style)
    assert len(found) % 2 == 0
    half = len(found) // 2
    names = dict(found[theme * half : (theme + 1) * half])
    ramp = [names[f"s{level}"] for level in range(17)]
    brightness = [luminance(colour) for colour in ramp]
    falling = brightness == sorted(brightness, reverse=theme == 0)
    assert falling, "more surprise is always darker, on dark paper always lighter"
    assert min(contrast(names["ink"], colour) for colour in ramp) >= 4.5
    for text in ("ink", "soft", "accent"):
        for ground in ("paper", "sheet"):
            assert contrast(names[text], names[ground]) >= 4.5, (text, ground)
    assert contrast(ramp[0], names["paper"]) < 1.05  # what was expected stays quiet
