"""Writing head and tail into a recipe: two numbers change and every other byte stays."""

from __future__ import annotations

import tomllib
from typing import TYPE_CHECKING

import pytest
import tomlkit
from coldstill.data.errors import ColdstillError
from coldstill.pipeline.recipe.writing import write_capture

if TYPE_CHECKING:
    from pathlib import Path

TOP = '# mine\nname = "r"\n'
CASES = [
    (
        "[logits]  # kept\nhead = 16   # k\ntail=0x10\nshard_tokens = 4\n",
        "[logits]  # kept\nhead = 4   # k\ntail=20\nshard_tokens = 4\n",
    ),
    ("[logits]\ntail = 1\n[students]\n", "[logits]\ntail = 20\nhead = 4\n[students]\n"),
    ("[ logits ]\n[a]\nhead = 3\n", "[ logits ]\nhead = 4\ntail = 20\n[a]\nhead = 3\n"),
    ("[logits]\r\nhead = 16\r\n# end\r\n", "[logits]\r\nhead = 4\r\ntail = 20\r\n# end\r\n"),
    ("[logits]\nhead=1\n\n# next\n[a]\n", "[logits]\nhead=4\ntail = 20\n\n# next\n[a]\n"),
    ("[logits]", "[logits]\nhead = 4\ntail = 20\n"),
    ("[a]\nhead = 1\n", "[a]\nhead = 1\n\n[logits]\nhead = 4\ntail = 20\n"),
    ("", "\n[logits]\nhead = 4\ntail = 20\n"),
    ("[logits.codec]\nname='plain'\n[logits]\nhead=1\n[a]\n",
     "[logits.codec]\nname='plain'\n[logits]\nhead=4\ntail = 20\n[a]\n"),
    ("[logits]\n  head = 1_6 \n\ttail = +2#x", "[logits]\n  head = 4 \n\ttail = 20#x"),
    ("logits = { head = 16, tail = 16 } # c\n", "logits = { head = 4, tail = 20 } # c\n"),
    ("logits.head = 16\nlogits.tail = 3 # x\n", "logits.head = 4\nlogits.tail = 20 # x\n"),
    ("[logits]\n'head' = 16\ntail = 1\n", "[logits]\n'head' = 4\ntail = 20\n"),
    ('["logits"]\nhead = [\n16]\n', '["logits"]\nhead = 4\ntail = 20\n'),
    ('n = """\n[logits]\nhead = 16\n"""\n[logits]\nhead = 1\ntail = 1\n',
     'n = """\n[logits]\nhead = 16\n"""\n[logits]\nhead = 4\ntail = 20\n'),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), CASES)
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_only_the_two_numbers_change(tmp_path: Path, before: str, after: str, start: str) -> None:
    newline = "\r\n" if "\r\n" in before else "\n"
    top = start + TOP.replace("\n", newline)
    path = tmp_path / "r.toml"
    path.write_bytes((top + before).encode())
    path.chmod(0o640)
    assert write_capture(path, 4, 20)
    text = path.read_bytes().decode()
    assert text == top + after
    table = tomllib.loads(text.removeprefix("\ufeff"))
    assert (table["logits"]["head"], table["logits"]["tail"]) == (4, 20)
    assert path.stat().st_mode & 0o777 == 0o640
    assert not write_capture(path, 4, 20), "the second time nothing changes"
    assert path.read_bytes().decode() == text


def test_an_edit_that_would_change_more_is_refused_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[logits]\nhead = 1\n", encoding="utf-8")
    for wrong in ("[logits]\nhead = 4\ntail = 20\nother = 1\n", "[logits"):
        monkeypatch.setattr(tomlkit, "dumps", lambda _, wrong=wrong: wrong)
        with pytest.raises(ColdstillError, match="tail = 20 by hand") as caught:
            write_capture(path, 4, 20)
        assert "\n" not in str(caught.value)
    assert path.read_text(encoding="utf-8") == "[logits]\nhead = 1\n"
    assert [p.name for p in tmp_path.iterdir()] == ["r.toml"]


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("[logits]\nhead = 1\ntail = 1\n", encoding="utf-8")
    link = tmp_path / "link.toml"
    link.symlink_to(real)
    write_capture(link, 4, 20)
    assert link.is_symlink()
    assert real.read_text(encoding="utf-8") == "[logits]\nhead = 4\ntail = 20\n"
