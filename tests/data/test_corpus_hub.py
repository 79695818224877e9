from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError

if TYPE_CHECKING:
    from coldstill.data.corpus.document import Document


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, texts in {"train": ["a", "b", "c"], "test": ["d"]}.items():
        path = tmp_path / "set" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts))
    return tmp_path


def read(entry: str, base: Path) -> list[Document]:
    return list(read_documents(list_sources([entry], base), Columns()))


def refusal(entry: str, base: Path) -> str:
    with pytest.raises(ColdstillError) as caught:
        read(entry, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_splits_of_a_local_folder_are_read_sliced_and_added(datasets: Any, folder: Path) -> None:
    for entry in (f"hub:{folder}/set?split=train", "hub:./set?split=train"):
        documents = read(entry, folder)
        assert [document.text for document in documents] == ["a", "b", "c"]
        assert documents[2].where == f"{entry}: record 3"
    assert [d.text for d in read("hub:./set?split=train[:1]+test", folder)] == ["a", "d"]
    entries = ["hub:./set?split=train", "hub:./set?split=test", "hub:./set?split=test"]
    assert [source.name for source in list_sources(entries, folder)] == entries[:2]


def test_a_single_split_needs_no_name(datasets: Any, folder: Path) -> None:
    (folder / "set" / "test.jsonl").unlink()
    assert len(read("hub:./set", folder)) == 3


def test_wrong_splits_and_missing_columns_are_reported(datasets: Any, folder: Path) -> None:
    told = refusal("hub:./set", folder)
    assert "has several splits (train, test)" in told
    assert told.endswith("hub:./set?split=train")
    assert 'Unknown split "nope"' in refusal("hub:./set?split=nope", folder)
    assert "hub:./nope: no such folder" in refusal("hub:./nope", folder)
    with pytest.raises(ColdstillError, match=r"missing column 'body' \(have: text, id\)"):
        list(read_documents(list_sources(["hub:./set?split=test"], folder), Columns(text="body")))


def test_options_reach_load_dataset(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(*names: str, **options: str) -> Any:
        seen.append((names, options))
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read("hub:org/name?split=train&name=en&revision=v1", Path("base"))
    assert seen == [(("org/name",), {"split": "train", "name": "en", "revision": "v1"})]


def test_a_name_that_cannot_be_loaded_is_one_line(
    datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*names: str, **options: str) -> Any:
        raise ConnectionError("cannot reach it\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    told = refusal("hub:org/name", Path("base"))
    assert told.startswith("hub:org/name: cannot be loaded: cannot reach it; check its name")


def test_a_missing_package_is_reported_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ColdstillError, match=r"pip install 'coldstill\[hub\]'$"):
        list_sources(["hub:org/name"], tmp_path)


def test_a_misspelled_entry_is_reported_at_once(tmp_path: Path) -> None:
    assert "cannot read 'spilt=a', expected one of name=" in refusal("hub:a/b?spilt=a", tmp_path)
    assert "cannot read 'split='" in refusal("hub:a/b?split=", tmp_path)
    assert "no name; write hub:ORG/NAME" in refusal("hub:", tmp_path)


def test_progress_bars_keep_their_setting(
    datasets: Any, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets.enable_progress_bars()
    read("hub:./set?split=test", folder)
    assert not datasets.are_progress_bars_disabled()
    assert "Generating" not in capfd.readouterr().err
