"""The documents of a folder, especially of a data set cloned from a hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from coldstill.data.corpus.folders import note_left_out
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError

if TYPE_CHECKING:
    from pathlib import Path

CARD = b"---\nlicense: mit\ndataset_info:\n  features: []\n---\n# A data set\n"


def touch(base: Path, *names: str) -> None:
    for name in names:
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CARD if path.name == "README.md" else b"{}")


def listed(base: Path, *entries: str) -> tuple[list[str], list[str]]:
    left_out: list[str] = []
    sources = list_sources(entries, base, left_out)
    return [source.name for source in sources], left_out


@pytest.mark.parametrize("entry", ["set", "set/*", "set/**"])
def test_only_the_records_of_a_cloned_data_set_are_documents(tmp_path: Path, entry: str) -> None:
    rows = ["set/data/train-00000-of-00002.parquet", "set/data/train-00001-of-00002.parquet"]
    about = ["LICENSE", "README.md", "dataset_infos.json", "load.py", "requirements.txt"]
    about = [f"set/{name}" for name in about]
    touch(tmp_path, *rows, *about, "set/.gitattributes", "set/.git/config.txt")
    assert listed(tmp_path, entry) == (rows, about)


def test_a_data_set_of_texts_keeps_its_texts(tmp_path: Path) -> None:
    touch(tmp_path, "set/README.md", "set/LICENSE.txt", "set/data/a.txt", "set/data/b.md")
    assert listed(tmp_path, "set") == (
        ["set/data/a.txt", "set/data/b.md"], ["set/LICENSE.txt", "set/README.md"]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mark", "content"),
    [
        ("README.md", b"\xef\xbb\xbf---\r\ntags:\r\n- code\r\n---\r\n# A data set\r\n"),
        (".gitattributes", b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"),
        (".cache/huggingface/download/a.lock", b""),
    ],
)
def test_a_downloaded_data_set_of_texts_is_recognised(
    tmp_path: Path, mark: str, content: bytes
) -> None:
    touch(tmp_path, "set/a.txt", "set/README.md")
    (tmp_path / "set/README.md").write_text("# Only words")
    assert listed(tmp_path, "set")[1] == []
    touch(tmp_path, f"set/{mark}")
    (tmp_path / "set" / mark).write_bytes(content)
    assert listed(tmp_path, "set") == (["set/a.txt"], ["set/README.md"])


def test_a_file_that_another_entry_names_is_not_reported_as_left_out(tmp_path: Path) -> None:
    touch(tmp_path, "set/a.jsonl", "set/README.md")
    names = ["set/a.jsonl", "set/README.md"]
    assert listed(tmp_path, "set", "set/README.md") == (names, [])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.jsonl.zst"])
def test_a_pointer_of_git_lfs_is_refused(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    for entry in (name, "*"):
        with pytest.raises(ColdstillError) as caught:
            listed(tmp_path, entry)
        assert str(caught.value) == (
            f"{name}: is a pointer of Git LFS, not the file itself; fetch that with git lfs pull"
        )


def test_a_text_about_records_is_not_a_document(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.jsonl", "d/notes.txt", "d/license.md")
    (tmp_path / "d/README.md").write_text("Nothing special.")
    assert listed(tmp_path, "d") == (["d/a.jsonl", "d/notes.txt"], ["d/README.md", "d/license.md"])


def test_a_readme_among_texts_is_a_document(tmp_path: Path) -> None:
    for name in ("README.md", "guide.md", "sub/LICENSE.txt"):
        touch(tmp_path, f"d/{name}")
        (tmp_path / "d" / name).write_text("---\ntitle: How to\n---\nText.")
    names = ["d/README.md", "d/guide.md", "d/sub/LICENSE.txt"]
    assert listed(tmp_path, "d") == (names, [])
    assert listed(tmp_path, "d/README.md") == (["d/README.md"], [])


def test_a_data_set_does_not_change_its_neighbours(tmp_path: Path) -> None:
    touch(tmp_path, "d/set/README.md", "d/set/a.jsonl", "d/texts/README.md", "d/texts/b.txt")
    (tmp_path / "d/texts/README.md").write_text("About nothing.")
    assert listed(tmp_path, "d") == (
        ["d/set/a.jsonl", "d/texts/README.md", "d/texts/b.txt"], ["d/set/README.md"]
    )  # fmt: skip


def test_left_out_files_are_named_in_one_sentence(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.txt", "d/b.csv", "d/c.jsonl.bz2", "d/d.zip", "d/e.tar.gz")
    _, left_out = listed(tmp_path, "d")
    assert note_left_out(left_out) == (
        "4 files are not documents and not read: d/b.csv, d/c.jsonl.bz2, d/d.zip and 1 more"
    )
    assert note_left_out(["d/x\n"]) == "1 file is not a document and not read: 'd/x\\n'"
    assert note_left_out([]) is None


@pytest.mark.parametrize(
    ("files", "splits", "advice"),
    [
        (["data/train-0.parquet", "data/test-0.parquet"], "test, train", "d/data/train*"),
        (["a/train/x.jsonl", "a/validation/y.jsonl"], "train, validation", "d/a/train"),
        (["valid.jsonl", "test.jsonl.gz"], "test, validation", "d/test*"),
        (["my_train.json", "my_dev.json"], "validation, train", "d/my_train*"),
    ],
)
def test_a_folder_of_several_splits_is_refused_by_name(
    tmp_path: Path, files: list[str], splits: str, advice: str
) -> None:
    touch(tmp_path, *(f"d/{name}" for name in files))
    with pytest.raises(ColdstillError) as caught:
        list_sources(["d"], tmp_path)
    assert str(caught.value) == (
        f"d: a data set of several splits ({splits}); name the files of the one to read, such as "
        f"{advice}"
    )
    assert listed(tmp_path, advice)[0]
    assert len(listed(tmp_path, *(f"d/{name}" for name in files))[0]) == 2


def test_texts_may_have_names_of_splits(tmp_path: Path) -> None:
    touch(tmp_path, "d/train.py", "d/test.py", "d/tests/eval.txt", "d/training.jsonl")
    assert len(listed(tmp_path, "d")[0]) == 4
