from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError


def fill(base: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def names(base: Path, *files: str) -> list[str]:
    return [source.name for source in list_sources(files, base)]


def refusal(base: Path, *files: str) -> str:
    with pytest.raises(ColdstillError) as caught:
        list_sources(files, base)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_source_has_name_path_size_and_time(tmp_path: Path) -> None:
    fill(tmp_path, "sub/a.jsonl.gz", data=b"12345")
    os.utime(tmp_path / "sub/a.jsonl.gz", ns=(7, 9))
    (source,) = list_sources(["sub/a.jsonl.gz"], tmp_path)
    assert source.name == "sub/a.jsonl.gz"
    assert source.path == tmp_path / "sub/a.jsonl.gz"
    assert (source.bytes, source.modified_ns) == (5, 9)
    assert (source.format, source.compression) == ("json lines", "gzip")


def test_an_absolute_path_needs_no_base(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt")
    assert names(Path("elsewhere"), f"{tmp_path}/a.txt") == [f"{tmp_path}/a.txt"]
    assert names(Path("elsewhere"), f"{tmp_path}/*.txt") == [f"{tmp_path}/a.txt"]


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, "a.txt")
    (source,) = list_sources(["~/a.txt"], Path("elsewhere"))
    assert (source.name, source.path) == ("~/a.txt", tmp_path / "a.txt")


def test_sources_are_in_the_order_of_entries_and_sorted_within_each(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.txt", "b/10.txt", "b/1/z.txt", "a.txt", "c/y.md", "c/x.txt")
    assert names(tmp_path, "c/*", "b", "a.txt") == [
        "c/x.txt",
        "c/y.md",
        "b/1/z.txt",
        "b/10.txt",
        "b/2.txt",
        "a.txt",
    ]


def test_a_file_named_twice_is_read_once_at_its_first_place(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.txt", "d/b.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "d/a.txt")
    entries = ("d/b.txt", "d", "d/*.txt", "./d/a.txt", str(tmp_path / "d"), "link.txt")
    assert names(tmp_path, *entries) == ["d/b.txt", "d/a.txt"]


def test_a_folder_gives_every_known_suffix_and_no_hidden_name(tmp_path: Path) -> None:
    known = [f"d/a{s}" for s in (".txt", ".md", ".rst", ".py", ".jsonl", ".ndjson", ".json")]
    known += ["d/a.parquet", "d/a.arrow", "d/a.txt.gz", "d/a.json.zst", "d/UPPER.TXT"]
    fill(tmp_path, *known, "d/a.csv", "d/a.gz", "d/noext", "d/.hid.txt", "d/.git/a.txt")
    assert names(tmp_path, "d/") == sorted(known)
    assert names(tmp_path, "d/**/*.txt") == ["d/a.txt"]


def test_two_stars_reach_any_depth(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.txt", "d/e/b.txt", "d/e/f/c.txt", "d/e/f/c.md")
    assert names(tmp_path, "d/**/*.txt") == ["d/a.txt", "d/e/b.txt", "d/e/f/c.txt"]
    assert len(names(tmp_path, "d/**")) == 4


def test_a_glob_skips_unknown_suffixes(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.txt", "d/LICENSE", "d/e/b.txt", "d/f/c.csv")
    assert names(tmp_path, "d/*") == ["d/a.txt", "d/e/b.txt"]


def test_a_file_name_with_brackets_is_not_a_glob(tmp_path: Path) -> None:
    fill(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path, "a[1].txt") == ["a[1].txt"]


def test_a_link_to_a_folder_above_is_ignored(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.txt", "other/b.txt")
    for link in ("up", "upper"):  # two of them, so that following would take 2 ** 40 steps
        (tmp_path / "d" / link).symlink_to(tmp_path / "d")
    (tmp_path / "d/side").symlink_to(tmp_path / "other")
    assert names(tmp_path, "d") == ["d/a.txt", "d/side/b.txt"]


def test_an_entry_that_matches_nothing_is_reported_with_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.csv")
    assert refusal(tmp_path, "nope.txt").startswith(
        f"'nope.txt': no such file or folder in {tmp_path};"
    )
    assert refusal(tmp_path, "*.txt").startswith(f"*.txt: nothing matches in {tmp_path};")
    assert f"d: nothing to read in the folder {tmp_path}/d; known are .txt" in refusal(
        tmp_path, "d"
    )
    assert refusal(tmp_path, "").startswith("'': no such file or folder")
    assert refusal(tmp_path).startswith("corpus.files: empty;")


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv", "b.csv.gz", "c")
    for name, shown in (
        ("a.csv", ".csv"),
        ("b.csv.gz", ".csv.gz"),
        ("c", "none"),
        ("*.csv", ".csv"),
    ):
        told = refusal(tmp_path, name)
        assert f"unknown suffix {shown!r}; known are .txt" in told
        assert told.endswith(".parquet .arrow, each also with .gz or .zst")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "d/b.jsonl", data=b"")
    assert refusal(tmp_path, "a.txt").startswith("a.txt: the file is empty;")
    assert refusal(tmp_path, "d").startswith("d/b.jsonl: the file is empty;")


def test_an_empty_text_found_in_a_folder_is_an_empty_document(tmp_path: Path) -> None:
    fill(tmp_path, "d/__init__.py", data=b"")
    (document,) = read_documents(list_sources(["d"], tmp_path), Columns())
    assert document.is_empty
    assert document.where == "d/__init__.py"


def test_a_file_without_permission_is_reported_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read anything
    assert refusal(tmp_path, "a.txt").startswith("a.txt: no permission to read the file;")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_without_permission_is_reported_at_once(tmp_path: Path) -> None:
    fill(tmp_path, "d/e/a.txt")
    (tmp_path / "d/e").chmod(0)
    try:
        assert refusal(tmp_path, "d").startswith(f"d: cannot be read at {tmp_path}/d/e")
        assert "cannot be read at" in refusal(tmp_path, "d/e/a.txt")
    finally:
        (tmp_path / "d/e").chmod(0o755)


@pytest.fixture
def datasets() -> Any:
    return pytest.importorskip("datasets")


def texts(base: Path, *files: str) -> list[str]:
    return [d.text for d in read_documents(list_sources(files, base), Columns())]


def test_a_saved_dataset_keeps_its_order(datasets: Any, tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(23)]
    dataset = datasets.Dataset.from_dict({"text": rows, "id": range(23)})
    dataset.save_to_disk(tmp_path / "set", num_shards=12)  # the tenth sorts before the second
    dataset.select([5, 2]).save_to_disk(tmp_path / "picked")
    assert texts(tmp_path, "set") == rows
    assert texts(tmp_path, "set/", "picked") == [*rows, "row 5", "row 2"]
    assert names(tmp_path, "set")[1] == "set/data-00001-of-00012.arrow"


def test_a_saved_dataset_in_a_folder_or_a_glob_is_recognised(datasets: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "d/set")
    fill(tmp_path, "d/set/cache-12.arrow", "d/z.txt")
    for entry in ("d", "d/*"):
        assert names(tmp_path, entry) == ["d/set/data-00000-of-00001.arrow", "d/z.txt"]
    (tmp_path / "d/set/cache-12.arrow").unlink()
    assert texts(tmp_path, "d/**", "d/**/*") == ["a", "x"]


def test_a_saved_dataset_of_several_splits_is_refused_by_name(
    datasets: Any, tmp_path: Path
) -> None:
    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(test=part, train=part).save_to_disk(tmp_path / "set")
    told = refusal(tmp_path, "set")
    assert told.startswith("set: a saved dataset of several splits (test, train);")
    assert told.endswith(": set/train")
    assert texts(tmp_path, "set/train") == ["a"]


def test_the_only_split_of_a_saved_dataset_is_read(datasets: Any, tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(validation=part).save_to_disk(tmp_path / "set")
    assert names(tmp_path, "set") == ["set/validation/data-00000-of-00001.arrow"]
    assert texts(tmp_path, "set") == ["a"]


def test_messages_of_different_shapes_survive_being_saved(datasets: Any, tmp_path: Path) -> None:
    fill(
        tmp_path,
        "chat.jsonl",
        data=b'{"messages": [{"role": "assistant", "content": "hi"}]}\n'
        b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": '
        b'[{"name": "f", "arguments": {"x": 1}}]}]}\n',
    )
    direct = list(read_documents(list_sources(["chat.jsonl"], tmp_path), Columns()))
    lines = [{"messages": list(document.messages)} for document in direct]
    datasets.Dataset.from_list(lines).save_to_disk(tmp_path / "set")
    saved = list(read_documents(list_sources(["set"], tmp_path), Columns()))
    assert saved[0].digest() == direct[0].digest()
    assert saved[1].messages == direct[1].messages


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ('{"_data_files": []}', "set: the saved dataset has no rows;"),
        ('{"_data_files": [{"filename": "a.arrow"}]}', "set: a.arrow is missing;"),
        ('{"_data_files": 3}', "set: its dataset_dict.json or state.json is not what"),
        ("[]", "set: its dataset_dict.json or state.json is not what"),
        (
            '{"_data_files": [{"filename": "i"}], "_indices_data_files": [{"filename": "i"}]}',
            "set: the saved dataset keeps its row order apart",
        ),
    ],
)
def test_a_damaged_saved_dataset_is_refused(tmp_path: Path, state: str, told: str) -> None:
    fill(tmp_path, "set/dataset_info.json", "set/i", data=b"{}")
    fill(tmp_path, "set/state.json", data=state.encode())
    assert refusal(tmp_path, "set").startswith(told)
