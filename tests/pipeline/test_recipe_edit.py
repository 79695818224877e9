"""Two numbers of a recipe change; every other byte stays."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.editing import write_capture

if TYPE_CHECKING:
    from pathlib import Path

OTHERS = '# mine\nname = "r"\n[corpus]\nfiles = ["a"]  # there\n'


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "[logits]  # kept\nhead = 16   # k\ntail=0x10\nshard_tokens = 4\n",
            "[logits]  # kept\nhead = 4   # k\ntail=20\nshard_tokens = 4\n",
        ),
        ("[logits]\ntail = 1\n[students]\n", "[logits]\nhead = 4\ntail = 20\n[students]\n"),
        (
            "[ logits ]\n[students.a]\nhead = 3\n",
            "[ logits ]\nhead = 4\ntail = 20\n[students.a]\nhead = 3\n",
        ),
        (
            "[logits]\r\nhead = 16\r\n# end\r\n",
            "[logits]\r\ntail = 20\r\nhead = 4\r\n# end\r\n",
        ),
        ("[logits]", "[logits]\nhead = 4\ntail = 20\n"),
        ("[logits.codec]\nname = 'compact'", None),
        ("[students.a]\nhead = 1", None),
        ("", None),
        (
            "[evaluation]\nhead = 128\ntail = 32\n[logits]\ncodec = { name = 'plain' }\nhead = 1\n",
            "[evaluation]\nhead = 128\ntail = 32\n[logits]\ntail = 20\n"
            "codec = { name = 'plain' }\nhead = 4\n",
        ),
        ("[logits]\n  head = 1_6 \n\ttail = +2#x", "[logits]\n  head = 4 \n\ttail = 20#x"),
    ],
)
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_only_the_two_numbers_change(
    tmp_path: Path, before: str, after: str | None, start: str
) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes((start + OTHERS + before).encode())
    path.chmod(0o640)
    assert write_capture(path, 4, 20)
    text = path.read_bytes().decode()
    if after is None:  # a table of its own at the end
        gap = "\n" if before and not before.endswith("\n") else ""
        assert text.startswith(start + OTHERS + before + gap)
    else:
        assert text == start + OTHERS + after
    table = tomllib.loads(text.removeprefix("\ufeff"))
    assert (table["logits"]["head"], table["logits"]["tail"]) == (4, 20)
    assert path.stat().st_mode & 0o777 == 0o640
    assert not write_capture(path, 4, 20)  # nothing is left to be changed
    assert path.read_bytes().decode() == text


@pytest.mark.parametrize(
    "before",
    [
        "logits = { head = 16, tail = 16 }\n",
        "logits.head = 16\n",
        "[logits]\n'head' = 16\ntail = 1\n",
        '["logits"]\nhead = 16\n',
        "[logits]\nhead = [\n16]\n",
    ],
)
def test_what_is_written_otherwise_is_refused_and_left(tmp_path: Path, before: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(before, encoding="utf-8")
    with pytest.raises(ColdstillError, match="by hand") as told:
        write_capture(path, 4, 20)
    assert "\n" not in str(told.value)
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.toml"]


def test_words_inside_a_text_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    before = 'note = """\n[logits]\nhead = 16\n"""\n[logits]\nhead = 1\ntail = 1\n'
    path.write_text(before, encoding="utf-8")
    with pytest.raises(ColdstillError, match="by hand"):
        write_capture(path, 4, 20)
    assert path.read_text(encoding="utf-8") == before


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("[logits]\nhead = 1\ntail = 1\n", encoding="utf-8")
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    write_capture(link, 4, 20)
    assert link.is_symlink()
    assert real.read_text(encoding="utf-8") == "[logits]\nhead = 4\ntail = 20\n"
