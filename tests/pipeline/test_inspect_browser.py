"""The page in a real browser, opened as a file: pointing, keys, a phone's width, both themes."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.pipeline.pages.inspect.text import percent
from inspected import SEQUENCES, desk_at, write_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from coldstill.data.schema import Block

pytestmark = pytest.mark.slow

pytest_plugins = ("browser", "desk")

HOVERED = ".text .t:not(.none)"


@pytest.fixture(scope="module")
def _page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Block]:
    """A page of every sequence, and the block it is about."""
    folder = tmp_path_factory.mktemp("page")
    block = write_store(folder / "s")
    desk_at(folder).done("inspect", "s", "--html", "p.html", "--count", "99", "--top", "3")
    return folder / "p.html", block


@pytest.fixture
def block(_page: tuple[Path, Block]) -> Block:
    """What the page is about."""
    return _page[1]


@pytest.fixture
def opened(open_file: Callable[..., Any], _page: tuple[Path, Block]) -> Callable[..., Any]:
    """Opens the page; fails if it requests a file or logs an error."""
    return functools.partial(open_file, _page[0])


def labelled(block: Block) -> Iterator[tuple[int, int, int]]:
    """Of every token with a target, in the order of the page: token number, sequence, target."""
    sequences = block.sequences
    first = sequences.tokens.offsets
    target = 0
    for row in range(len(block)):
        for position in sequences.positions[row]:
            yield int(first[row] + position + 1), row, target
            target += 1


def shown(page: Any) -> dict[str, str]:
    """The figures of the open token, by name."""
    names = page.locator("#prediction .numbers dt").all_inner_texts()
    return dict(zip(names, page.locator("#prediction .numbers dd").all_inner_texts(), strict=True))


def test_every_token_is_on_the_page_and_no_other(opened: Any, block: Block) -> None:
    page = opened()
    assert page.locator("section").count() == SEQUENCES
    assert page.locator(".text .t").count() == len(block.sequences.tokens.values)
    assert page.locator(HOVERED).count() == len(block.targets)
    assert page.locator(".text .border").count() == len(block.sequences.document_ids.values)
    assert page.locator("svg").count() == 2
    assert page.locator("script").count() == 2
    assert page.locator("img").count() == 0
    assert page.title() == "s - coldstill inspect"


def test_pointing_at_a_token_shows_its_target(opened: Any, block: Block) -> None:
    page = opened()
    targets = block.targets
    surprising = np.argsort(targets.label_logprob)
    known = list(labelled(block))
    for target in (*surprising[:3], *surprising[-3:]):
        number, row, _ = known[target]
        element = page.locator(".text .t").nth(number)
        element.hover()
        place = number - int(block.sequences.tokens.offsets[row])
        where = page.locator("#prediction h3 + p").inner_text()
        token = int(block.sequences.tokens.values[number])
        assert where == f"token {place} of sequence {row}, id {token}"
        assert f"Stored at position {place - 1}," in page.locator("#prediction .how").inner_text()
        figures = shown(page)
        assert figures["probability"] == percent(np.exp(targets.label_logprob[target]))
        surprise = -float(targets.label_logprob[target])
        assert figures["surprise"] == f"{surprise:.2f} nats"
        assert figures["entropy"] == f"{targets.entropy[target]:.2f} nats"
        head = targets.head_ids[target].tolist()
        rank = str(head.index(token) + 1) if token in head else f"> {len(head)}"
        assert figures["rank"] == rank
        marked = page.locator("#prediction .best .label")
        assert marked.count() == 1
        rows = page.locator("#prediction .best li").all_inner_texts()
        best = [percent(p) for p in np.exp(targets.head_logprobs[target, :3])]
        assert [row.split()[-1] for row in rows[:3]] == best


def test_a_token_without_a_target_shows_the_reason(opened: Any, block: Block) -> None:
    page = opened()
    page.locator(".text .t").first.hover()
    assert "begins here: no text before it" in page.locator("#prediction").inner_text()
    sequences = block.sequences
    learned = {number for number, _, _ in labelled(block)}
    starts = np.concatenate(
        [sequences.document_starts[row] + sequences.tokens.offsets[row] for row in range(SEQUENCES)]
    )
    rest = sorted(set(range(len(sequences.tokens.values))) - learned - set(starts.tolist()))
    assert rest
    page.locator(".text .t").nth(rest[0]).hover()
    assert "nothing is stored" in page.locator("#prediction").inner_text()


def test_keys_move_from_token_to_token(opened: Any) -> None:
    page = opened()
    tokens = page.locator(".text .t")

    def at() -> int:
        return int(page.evaluate("document.activeElement.dataset.index ?? -1"))

    def press(*keys: str) -> int:
        for key in keys:
            page.keyboard.press(key)
        return at()

    assert press("ArrowRight") == 0
    assert press("ArrowRight", "ArrowRight") == 2
    assert press("ArrowLeft") == 1
    assert press("ArrowLeft", "ArrowLeft", "ArrowLeft") == 0
    length = page.locator(".text").first.locator(".t").count()
    assert press("End") == length - 1
    assert press("ArrowRight") == length  # on into the next sequence
    assert press("Home") == length
    below = press("ArrowDown")
    assert tokens.nth(below).bounding_box()["y"] > tokens.nth(length).bounding_box()["y"]
    assert tokens.nth(press("ArrowUp")).bounding_box()["y"] == pytest.approx(
        tokens.nth(length).bounding_box()["y"]
    )
    assert page.locator(".text .t.open").count() == 1
    assert page.locator("#prediction h3").count() == 1
    assert press("Escape") == -1
    assert page.locator(".text .t.open").count() == 0
    page.keyboard.press("Tab")  # the control before the text
    page.keyboard.press("Tab")
    assert at() == 0


def test_a_phone_needs_no_scrolling_sideways(opened: Any) -> None:
    page = opened(390, 844, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    panel = page.locator("#panel")
    assert not panel.is_visible()
    element = page.locator(HOVERED).nth(12)
    element.tap()
    assert panel.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box, sheet = element.bounding_box(), panel.bounding_box()
    assert box["y"] + box["height"] <= sheet["y"]  # what was tapped is not covered
    assert sheet["y"] + sheet["height"] == pytest.approx(844, abs=1)
    page.locator("#close").tap()
    assert not panel.is_visible()


def test_the_page_follows_the_theme_and_jumps_to_a_sequence(opened: Any) -> None:
    for theme in ("light", "dark"):
        page = opened(1280, 500, color_scheme=theme)
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        bright = [int(part) for part in re.findall(r"\d+", paper)]
        assert (sum(bright) > 600) == (theme == "light")
    page.locator("#go").select_option("8")
    heading = page.locator("h2", has_text="Sequence 8")
    assert 0 < heading.bounding_box()["y"] < 200
    assert page.locator("#go").input_value() == "go to"
    # leaving the text shows the chosen token again
    tokens = page.locator(".text .t")
    tokens.nth(3).click()
    chosen = page.locator("#prediction").inner_text()
    tokens.nth(5).hover()
    assert page.locator("#prediction").inner_text() != chosen
    page.locator("h1").hover()
    assert page.locator("#prediction").inner_text() == chosen
