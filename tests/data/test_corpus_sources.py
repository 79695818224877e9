"""Where documents come from: files, folders, saved data sets, a hub and the standard library."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import refusals
from coldstill.data.corpus.columns import Columns
from coldstill.data.corpus.folders import note_left_out
from coldstill.data.corpus.formats import read_documents
from coldstill.data.corpus.sources import list_sources
from coldstill.data.errors import ColdstillError
from coldstill.data.packaged import packaged

if TYPE_CHECKING:
    from coldstill.data.corpus.document import Document


def fill(base: Path, *names: str, data: bytes = b"x") -> None:
    for name in names:
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def names(base: Path, *files: str) -> list[str]:
    return [source.name for source in list_sources(files, base)]


def refusal(base: Path, *files: str) -> str:
    return refusals.refusal(list_sources, files, base)


def test_a_source_has_name_path_size_and_time(tmp_path: Path) -> None:
    fill(tmp_path, "sub/a.jsonl.gz", data=b"12345")
    os.utime(tmp_path / "sub/a.jsonl.gz", ns=(7, 9))
    (source,) = list_sources(["sub/a.jsonl.gz"], tmp_path)
    assert source.name == "sub/a.jsonl.gz"
    assert source.path == tmp_path / "sub/a.jsonl.gz"
    assert (source.bytes, source.modified_ns) == (5, 9)
    assert (source.format, source.compression) == ("json lines", "gzip")


def test_an_absolute_path_or_one_at_home_needs_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path, "a.txt")
    for entry in (f"{tmp_path}/a.txt", f"{tmp_path}/*.txt"):
        assert names(Path("elsewhere"), entry) == [f"{tmp_path}/a.txt"]
    (source,) = list_sources(["~/a.txt"], Path("elsewhere"))
    assert (source.name, source.path) == ("~/a.txt", tmp_path / "a.txt")


def test_sources_are_in_the_order_of_entries_and_sorted_within_each(tmp_path: Path) -> None:
    fill(tmp_path, "b/2.txt", "b/10.txt", "b/1/z.txt", "a.txt", "c/y.md", "c/x.txt")
    expected = ["c/x.txt", "c/y.md", "b/1/z.txt", "b/10.txt", "b/2.txt", "a.txt"]
    assert names(tmp_path, "c/*", "b", "a.txt") == expected


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


def test_globs_reach_any_depth_and_skip_unknown_suffixes(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.txt", "d/LICENSE", "d/e/b.txt", "d/e/f/c.txt", "d/e/f/c.md", "d/f/c.csv")
    assert names(tmp_path, "d/**/*.txt") == ["d/a.txt", "d/e/b.txt", "d/e/f/c.txt"]
    assert len(names(tmp_path, "d/**")) == len(names(tmp_path, "d/*")) == 4
    fill(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path, "a[1].txt") == ["a[1].txt"]  # a file's name, not a glob


def test_a_link_to_a_folder_above_is_ignored(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.txt", "other/b.txt")
    for link in ("up", "upper"):  # two of them, so that following would take 2 ** 40 steps
        (tmp_path / "d" / link).symlink_to(tmp_path / "d")
    (tmp_path / "d/side").symlink_to(tmp_path / "other")
    assert names(tmp_path, "d") == ["d/a.txt", "d/side/b.txt"]


def test_an_entry_that_matches_nothing_is_reported_with_the_folder(tmp_path: Path) -> None:
    fill(tmp_path, "d/a.csv")
    for entry, message in (
        ("nope.txt", f"'nope.txt': no such file or folder in {tmp_path};"),
        ("*.txt", f"*.txt: nothing matches in {tmp_path};"),
        ("d", f"d: nothing to read in the folder {tmp_path}/d; known are .txt"),
        ("", "'': no such file or folder"),
    ):
        assert refusal(tmp_path, entry).startswith(message)
    assert refusal(tmp_path).startswith("corpus.files: empty;")


def test_an_unknown_suffix_names_the_known_ones(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv", "b.csv.gz", "c")
    suffixes = {"a.csv": ".csv", "b.csv.gz": ".csv.gz", "c": "none", "*.csv": ".csv"}
    for name, suffix in suffixes.items():
        message = refusal(tmp_path, name)
        assert f"unknown suffix {suffix!r}; known are .txt" in message
        assert message.endswith(".parquet .arrow, each also with .gz or .zst")


def test_an_empty_file_is_refused_unless_it_is_a_text_found_in_a_folder(tmp_path: Path) -> None:
    fill(tmp_path, "a.txt", "d/b.jsonl", "e/__init__.py", data=b"")
    assert refusal(tmp_path, "a.txt").startswith("a.txt: the file is empty;")
    assert refusal(tmp_path, "d").startswith("d/b.jsonl: the file is empty;")
    (document,) = read_documents(list_sources(["e"], tmp_path), Columns())
    assert document.is_empty
    assert document.where == "e/__init__.py"


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


def test_one_split_of_a_saved_dataset_is_read(datasets: Any, tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(test=part, train=part).save_to_disk(tmp_path / "set")
    message = refusal(tmp_path, "set")
    assert message.startswith("set: a saved dataset of several splits (test, train);")
    assert message.endswith(": set/train")
    datasets.DatasetDict(validation=part).save_to_disk(tmp_path / "only")
    assert names(tmp_path, "only") == ["only/validation/data-00000-of-00001.arrow"]
    assert texts(tmp_path, "set/train") == texts(tmp_path, "only") == ["a"]


def test_a_damaged_saved_dataset_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "set/dataset_info.json", "set/i", data=b"{}")
    not_expected = "its dataset_dict.json or state.json is not what"
    indices = '{"_data_files": [{"filename": "i"}], "_indices_data_files": [{"filename": "i"}]}'
    for state, message in {
        '{"_data_files": []}': "the saved dataset has no rows;",
        '{"_data_files": [{"filename": "a.arrow"}]}': "a.arrow is missing;",
        '{"_data_files": 3}': not_expected,
        "[]": not_expected,
        indices: "the saved dataset keeps its row order apart",
    }.items():
        fill(tmp_path, "set/state.json", data=state.encode())
        assert refusal(tmp_path, "set").startswith(f"set: {message}")


CARD = b"---\nlicense: mit\ndataset_info:\n  features: []\n---\n# A data set\n"


def touch_records(base: Path, *names: str) -> None:
    for name in names:
        fill(base, name, data=CARD if name.endswith("README.md") else b"{}")


def listed(base: Path, *entries: str) -> tuple[list[str], list[str]]:
    left_out: list[str] = []
    sources = list_sources(entries, base, left_out)
    return [source.name for source in sources], left_out


@pytest.mark.parametrize("entry", ["set", "set/*", "set/**"])
def test_only_the_records_of_a_cloned_data_set_are_documents(tmp_path: Path, entry: str) -> None:
    rows = ["set/data/train-00000-of-00002.parquet", "set/data/train-00001-of-00002.parquet"]
    about = ["LICENSE", "README.md", "dataset_infos.json", "load.py", "requirements.txt"]
    about = [f"set/{name}" for name in about]
    touch_records(tmp_path, *rows, *about, "set/.gitattributes", "set/.git/config.txt")
    assert listed(tmp_path, entry) == (rows, about)


def test_a_data_set_of_texts_keeps_its_texts(tmp_path: Path) -> None:
    touch_records(tmp_path, "set/README.md", "set/LICENSE.txt", "set/data/a.txt", "set/data/b.md")
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
    touch_records(tmp_path, "set/a.txt", "set/README.md")
    (tmp_path / "set/README.md").write_text("# Only words")
    assert listed(tmp_path, "set")[1] == []
    touch_records(tmp_path, f"set/{mark}")
    (tmp_path / "set" / mark).write_bytes(content)
    assert listed(tmp_path, "set") == (["set/a.txt"], ["set/README.md"])


def test_a_pointer_of_git_lfs_is_refused(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.jsonl.zst"):
        fill(tmp_path, name, data=pointer)
        for entry in (name, "*"):
            assert refusal(tmp_path, entry) == (
                f"{name}: is a pointer of Git LFS, not the file itself; fetch that with git lfs "
                "pull"
            )
        (tmp_path / name).unlink()


def test_texts_about_records_are_not_documents(tmp_path: Path) -> None:
    touch_records(tmp_path, "d/a.jsonl", "d/notes.txt", "d/license.md")
    fill(tmp_path, "d/README.md", data=b"Nothing special.")
    assert listed(tmp_path, "d") == (["d/a.jsonl", "d/notes.txt"], ["d/README.md", "d/license.md"])
    touch_records(tmp_path, "set/a.jsonl", "set/README.md")
    names = ["set/a.jsonl", "set/README.md"]
    assert listed(tmp_path, "set", "set/README.md") == (names, [])  # named by another entry


def test_a_readme_among_texts_is_a_document(tmp_path: Path) -> None:
    names = ["d/README.md", "d/guide.md", "d/sub/LICENSE.txt"]
    fill(tmp_path, *names, data=b"---\ntitle: How to\n---\nText.")
    assert listed(tmp_path, "d") == (names, [])
    assert listed(tmp_path, "d/README.md") == (["d/README.md"], [])


def test_a_data_set_does_not_change_its_neighbours(tmp_path: Path) -> None:
    touch_records(tmp_path, "d/set/README.md", "d/set/a.jsonl", "d/texts/b.txt")
    fill(tmp_path, "d/texts/README.md", data=b"About nothing.")
    assert listed(tmp_path, "d") == (
        ["d/set/a.jsonl", "d/texts/README.md", "d/texts/b.txt"], ["d/set/README.md"]
    )  # fmt: skip


def test_left_out_files_are_named_in_one_sentence(tmp_path: Path) -> None:
    touch_records(tmp_path, "d/a.txt", "d/b.csv", "d/c.jsonl.bz2", "d/d.zip", "d/e.tar.gz")
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
    touch_records(tmp_path, *(f"d/{name}" for name in files))
    assert refusal(tmp_path, "d") == (
        f"d: a data set of several splits ({splits}); name the files of the one to read, such as "
        f"{advice}"
    )
    assert listed(tmp_path, advice)[0]
    assert len(listed(tmp_path, *(f"d/{name}" for name in files))[0]) == 2


def test_texts_may_have_names_of_splits(tmp_path: Path) -> None:
    touch_records(tmp_path, "d/train.py", "d/test.py", "d/tests/eval.txt", "d/training.jsonl")
    assert len(listed(tmp_path, "d")[0]) == 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package `datasets`, with a cache of its own."""
    package = pytest.importorskip("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return package


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    """A data set of two splits in the folder `set`."""
    for split, rows in {"train": "abc", "test": "d"}.items():
        lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in rows)
        fill(tmp_path, f"set/{split}.jsonl", data=lines.encode())
    return tmp_path


def from_hub(entry: str, base: Path) -> list[Document]:
    return list(read_documents(list_sources([entry], base), Columns()))


def test_splits_of_a_local_folder_are_read_sliced_and_added(hub: Any, split_folder: Path) -> None:
    for entry in (f"hub:{split_folder}/set?split=train", "hub:./set?split=train"):
        documents = from_hub(entry, split_folder)
        assert [document.text for document in documents] == ["a", "b", "c"]
        assert documents[2].where == f"{entry}: record 3"
    assert [d.text for d in from_hub("hub:./set?split=train[:1]+test", split_folder)] == ["a", "d"]
    (split_folder / "set" / "test.jsonl").rename(split_folder / "aside.jsonl")
    assert len(from_hub("hub:./set", split_folder)) == 3  # a single split needs no name
    (split_folder / "aside.jsonl").rename(split_folder / "set" / "test.jsonl")
    entries = ["hub:./set?split=train", "hub:./set?split=test", "hub:./set?split=test"]
    assert [source.name for source in list_sources(entries, split_folder)] == entries[:2]


def test_a_wrong_entry_of_a_hub_is_refused(hub: Any, split_folder: Path) -> None:
    message = refusals.refusal(from_hub, "hub:./set", split_folder)
    assert "has several splits (train, test)" in message
    assert message.endswith("hub:./set?split=train")
    for entry, expected in (
        ("hub:./set?split=nope", 'Unknown split "nope"'),
        ("hub:./nope", "hub:./nope: no such folder"),
        ("hub:a/b?spilt=a", "cannot read 'spilt=a', expected one of name="),
        ("hub:a/b?split=", "cannot read 'split='"),
        ("hub:", "no name; write hub:ORG/NAME"),
    ):
        assert expected in refusals.refusal(from_hub, entry, split_folder)
    sources = list_sources(["hub:./set?split=test"], split_folder)
    with pytest.raises(ColdstillError, match=r"missing column 'body' \(have: text, id\)"):
        next(read_documents(sources, Columns(text="body")))


def test_options_reach_load_dataset_and_its_errors_are_one_line(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def load_dataset(*names: str, **options: str) -> Any:
        if not options.get("name"):
            raise ConnectionError("cannot reach it\nand more")
        seen.append((names, options))
        return hub.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    from_hub("hub:org/name?split=train&name=en&revision=v1", Path("base"))
    options = {"split": "train", "name": "en", "revision": "v1", "streaming": False}
    assert seen == [(("org/name",), options)]
    message = refusals.refusal(from_hub, "hub:org/name", Path("base"))
    assert message.startswith("hub:org/name: cannot be loaded: cannot reach it; check its name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refusals.refusal(from_hub, "hub:org/name", Path("base"))
    assert message.endswith("pip install 'coldstill[hub]'")


def test_progress_bars_keep_their_setting(
    hub: Any, split_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.enable_progress_bars()
    from_hub("hub:./set?split=test", split_folder)
    assert not hub.are_progress_bars_disabled()
    assert "Generating" not in capfd.readouterr().err


MODULES = {
    "zeta.py": b"z = 1\r\n",
    "alpha/deep.py": b"a = 1\n",
    "alpha/__init__.py": b"",
    "alpha/data.txt": b"no",
    "latin.py": b"# -*- coding: latin-1 -*-\nname = '\xe9'\n",
    "broken.py": b"name = '\xe9'\n",
    "broken_late.py": b"#\n#\n#\nname = '\xe9'\n",
    "cookie.py": b"# -*- coding: nonsense -*-\n",
    **dict.fromkeys(["test/test_a.py", "alpha/tests/test_b.py", "alpha/idle_test/test_c.py"], b"t"),
    **dict.fromkeys(["alpha/__pycache__/d.py", "site-packages/e.py", "dist-packages/f.py"], b"t"),
}


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, data in MODULES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


def test_sources_of_the_standard_library_are_read_in_order(stdlib: Path) -> None:
    """Declared encodings are honoured; files that cannot be decoded are empty."""
    documents = read_documents(list_sources(["stdlib:"], Path("elsewhere")), Columns())
    found = {document.where.removeprefix("stdlib:"): document.text for document in documents}
    assert list(found.items()) == [
        ("alpha/__init__.py", ""),
        ("alpha/deep.py", "a = 1\n"),
        ("broken.py", ""),
        ("broken_late.py", ""),
        ("cookie.py", ""),
        ("latin.py", "# -*- coding: latin-1 -*-\nname = 'é'\n"),
        ("zeta.py", "z = 1\n"),
    ]


def test_an_entry_without_sources_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    for entry, message in (
        ("stdlib:", "stdlib: no Python sources in"),
        ("stdlib:json", "stdlib:json: names nothing; write stdlib:"),
    ):
        assert message in refusals.refusal(list_sources, [entry], tmp_path)


def test_this_pythons_own_sources_are_read() -> None:
    sources = {source.name: source for source in list_sources(["stdlib:"], Path())}
    decoder = sources["stdlib:json/decoder.py"]
    assert decoder.bytes > 0
    assert decoder.modified_ns > 0
    (document,) = read_documents([decoder], Columns())
    assert document.text == Path(json.decoder.__file__).read_text(encoding="utf-8")
    assert not any("/test/" in name or "site-packages" in name for name in sources)


def test_a_name_may_stand_for_a_path_in_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "small.gguf").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = packaged("package:some_models/small.gguf", "teacher.model")
    assert found == package / "small.gguf"
    assert packaged("models/small.gguf", "teacher.model") is None
    for name, message in (
        ("package:some_models/other.gguf", "the package 'some_models' has no file or folder 'oth"),
        ("package:some_models", "the package 'some_models' has no file or folder ''; name one"),
        ("package:__main__/x", "no Python package '__main__' is installed here"),
        ("package:no_models/x.gguf", "no Python package 'no_models' is installed here; install it"),
        ("package:/x.gguf", "'package:/x.gguf' names no package; write package:NAME/PATH"),
    ):
        with pytest.raises(ColdstillError, match=f"^teacher.model: {message}"):
            packaged(name, "teacher.model")


def test_files_and_folders_inside_a_package_are_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "some_texts" / "texts"
    texts.mkdir(parents=True)
    (tmp_path / "some_texts" / "__init__.py").touch()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text(name, encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    one = list_sources(["package:some_texts/texts/b.txt"], tmp_path / "elsewhere")
    assert [(source.name, source.path) for source in one] == [
        ("package:some_texts/texts/b.txt", texts / "b.txt")
    ]
    both = list_sources(["package:some_texts/texts"], tmp_path)
    assert [source.path for source in both] == [texts / "a.txt", texts / "b.txt"]
    with pytest.raises(ColdstillError, match=r"corpus\.files: no Python package 'no_texts'"):
        list_sources(["package:no_texts/a.txt"], tmp_path)
