from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError

MODULES = {
    "zeta.py": b"z = 1\r\n",
    "alpha/deep.py": b"a = 1\n",
    "alpha/__init__.py": b"",
    "alpha/data.txt": b"no",
    "latin.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n",
    "broken.py": b"name = '\xe9'\n",
    "broken_late.py": b"#\n#\n#\nname = '\xe9'\n",
    "cookie.py": b"# -*- coding: nonsense -*-\n",
    "test/test_a.py": b"t = 1\n",
    "alpha/tests/test_b.py": b"t = 1\n",
    "alpha/idle_test/test_c.py": b"t = 1\n",
    "alpha/__pycache__/d.py": b"t = 1\n",
    "site-packages/e.py": b"t = 1\n",
    "dist-packages/f.py": b"t = 1\n",
}


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, data in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_only_sources_of_the_standard_library_are_listed_in_order(stdlib: Path) -> None:
    assert [source.name for source in list_sources(["stdlib:"], Path("elsewhere"))] == [
        "stdlib:alpha/__init__.py",
        "stdlib:alpha/deep.py",
        "stdlib:broken.py",
        "stdlib:broken_late.py",
        "stdlib:cookie.py",
        "stdlib:latin.py",
        "stdlib:zeta.py",
    ]


def test_declared_encodings_are_honoured_and_undecodable_files_are_empty(stdlib: Path) -> None:
    documents = read_documents(list_sources(["stdlib:"], stdlib), Columns())
    texts = {document.where.rpartition("/")[2]: document.text for document in documents}
    assert texts["stdlib:latin.py"] == "# -*- coding: latin-1 -*-\nname = 'é'\n"
    assert texts["stdlib:zeta.py"] == "z = 1\n"
    assert sorted(name for name, text in texts.items() if not text) == [
        "__init__.py",
        "stdlib:broken.py",
        "stdlib:broken_late.py",
        "stdlib:cookie.py",
    ]
    assert len(texts) == 7


def test_a_python_without_sources_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ColdstillError, match="stdlib: no Python sources in"):
        list_sources(["stdlib:"], tmp_path)


def test_nothing_may_follow_the_colon(tmp_path: Path) -> None:
    with pytest.raises(ColdstillError, match="stdlib:json: names nothing; write stdlib:"):
        list_sources(["stdlib:json"], tmp_path)


def test_this_pythons_own_sources_are_read() -> None:
    sources = {source.name: source for source in list_sources(["stdlib:"], Path())}
    decoder = sources["stdlib:json/decoder.py"]
    assert decoder.bytes > 0
    assert decoder.modified_ns > 0
    (document,) = read_documents([decoder], Columns())
    assert document.text == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert not any("/test/" in name or "site-packages" in name for name in sources)
