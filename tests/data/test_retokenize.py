"""Stores in a student's tokens: alignment, chunks and refusals."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.checks import Rules, check_block
from coldstill.data.maintenance.merge import merge
from coldstill.data.maintenance.retokenize import Decisions, retokenize
from coldstill.data.maintenance.rewrite import convert
from coldstill.data.maintenance.shrink import shrink, take
from coldstill.data.maintenance.verify import verify
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.retokenized.chunks import Laid, chunks_of
from coldstill.data.retokenized.mapping import relabelling
from coldstill.data.retokenized.spelling import Speller
from coldstill.data.schema import Block, Capture
from coldstill.data.store.layout import commit_name, shard_name
from coldstill.data.store.reader import StoreReader, open_store
from coldstill.data.store_writer import StoreWriter
from coldstill.pipeline.pages.inspect.path import Subject
from coldstill.pipeline.pages.inspect.store import describe
from oracles import digests, everything
from refusals import refusal
from retokenizing import ADDED, CAPTURES, MERGES, TEXTS, UDHR, loaded, matched
from spellings import (
    END,
    byte_pairs,
    characters,
    random_records,
    saved,
    text_store,
)
from tokenizers import Tokenizer, models, normalizers

if TYPE_CHECKING:
    from collections.abc import Callable

pytest_plugins = ("retokenized_stores",)


def slow_chunks(teacher: list[tuple[int, int]], student: list[tuple[int, int]]) -> list[Any]:
    """The chunks of two lists of spans, byte by byte: the tokens of each side that begin in it."""
    ours, theirs = ({at for span in side for at in span} for side in (teacher, student))
    found, begin = [], None
    for place in range(max(ours | theirs) + 1):
        if place in ours and place in theirs:
            if begin is not None:
                found.append(
                    tuple(
                        [i for i, (start, _) in enumerate(side) if begin <= start < place]
                        for side in (teacher, student)
                    )
                )
            begin = place
    return found


def test_chunks_are_those_of_a_walk_over_the_bytes() -> None:
    random = np.random.default_rng(0)
    several = gaps = 0
    for _ in range(300):
        length = int(random.integers(1, 24))
        sides = []
        for gap in (0.0, 0.2):
            inner = np.flatnonzero(random.random(length - 1) < 0.5) + 1
            edges = [0, *inner.tolist(), length]
            spans = [span for span in itertools.pairwise(edges) if random.random() >= gap]
            sides.append(spans)
        teacher, student = sides
        if not student:
            continue
        laid = [Laid(*np.array(side, np.int64).reshape(-1, 2).T) for side in sides]
        found = chunks_of(*laid)
        wanted = slow_chunks(teacher, student)
        assert len(found) == len(wanted)
        for i, (ours, theirs) in enumerate(wanted):
            assert ours == [*range(found.teacher_C[i], found.teacher_C[i] + len(ours))]
            assert found.teacher_counts_C[i] == len(ours)
            assert found.student_counts_C[i] == len(theirs)
            if theirs:
                assert theirs[0] == found.student_C[i]
            covered = sum(end - start for start, end in (student[j] for j in theirs))
            width = sum(end - start for start, end in (teacher[j] for j in ours))
            assert found.whole_C[i] == (covered == width and bool(theirs))
            several += len(ours) > 1 and len(theirs) > 1
            gaps += covered < width
    assert several > 20
    assert gaps > 20


@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("form", ["arrow", "zarr"])
def test_the_same_tokenizer_gives_the_same_store_bit_for_bit(
    stores: Callable[..., str], folder: Path, tmp_path: Path, codec: str, form: str
) -> None:
    path = stores("both", codec, form)
    retokenize(path, str(tmp_path / "same"), folder / "teacher")
    assert digests(tmp_path / "same") == digests(Path(path))


def test_other_ids_for_the_same_tokens_change_nothing_else(
    stores: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    path = stores("both")
    manifest = retokenize(path, str(tmp_path / "new"), folder / "permuted")
    assert not list(verify(str(tmp_path / "new")))
    assert manifest.capture == open_store(path).manifest.capture
    ids = relabelling(Speller(folder / "teacher", "a"), Speller(folder / "permuted", "b"))
    assert ids is not None
    assert (ids != np.arange(len(ids))).any()
    old, new = everything(path), everything(tmp_path / "new")
    assert np.array_equal(new.sequences.tokens.values, ids[old.sequences.tokens.values])
    assert np.array_equal(new.sequences.positions.values, old.sequences.positions.values)
    assert np.array_equal(new.targets.head_ids, ids[old.targets.head_ids])
    assert np.array_equal(new.targets.tail.ids, ids[old.targets.tail.ids])
    for name in ("head_logprobs", "log_tail", "label_logprob", "entropy", "log_norm"):
        assert np.array_equal(getattr(new.targets, name), getattr(old.targets, name))


def test_a_further_token_that_never_occurs_changes_nothing_but_ids(
    stores: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    """The general way, in which every token is a chunk of its own."""
    manifest = retokenize(stores("samples"), str(tmp_path / "new"), folder / "extra")
    assert manifest.capture.chunks
    assert manifest.retokenized is not None
    assert manifest.retokenized.ambiguous_mass == 0
    assert manifest.retokenized.counts["left_labels"] == 0
    old, new = everything(stores("samples")), everything(tmp_path / "new")
    names = [loaded(folder / name) for name in ("teacher", "extra")]
    for one, other in zip(old.sequences.tokens.values, new.sequences.tokens.values, strict=True):
        assert names[0].id_to_token(int(one)) == names[1].id_to_token(int(other))
    assert (new.targets.chunk_sizes == 1).all()
    for name in ("log_tail", "label_logprob", "entropy"):
        assert np.array_equal(getattr(new.targets, name), getattr(old.targets, name))
    assert np.array_equal(new.targets.tail.offsets, old.targets.tail.offsets)


def texts_of(block: Block, tokenizer: Any) -> list[str]:
    """The text of every document, special tokens included."""
    found = []
    for row, tokens in enumerate(block.sequences.tokens):
        borders = [*block.sequences.document_starts[row].tolist(), len(tokens)]
        for start, end in itertools.pairwise(borders):
            found.append(tokenizer.decode(tokens[start:end].tolist(), skip_special_tokens=False))
    return found


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("codec", ["plain", "compact"])
@pytest.mark.parametrize("name", ["added", "removed", "bytes", "characters"])
def test_a_store_keeps_its_texts_and_the_probability_of_each(
    stores: Callable[..., str], folder: Path, tmp_path: Path, name: str, codec: str, capture: str
) -> None:
    path = stores(capture, codec)
    manifest = retokenize(path, str(tmp_path / "new"), folder / name)
    assert not list(verify(str(tmp_path / "new")))
    old, new = everything(path), everything(tmp_path / "new")
    assert texts_of(new, loaded(folder / name)) == texts_of(old, loaded(folder / "teacher"))
    assert np.array_equal(new.sequences.ids, old.sequences.ids)
    assert manifest.retokenized is not None
    sizes = new.targets.chunk_sizes[:, 0]
    assert manifest.retokenized.positions == np.count_nonzero(sizes > 0)
    assert np.abs(sizes).sum() == len(sizes)
    if manifest.retokenized.counts["left_labels"] == 0:
        slack = 2 * len(sizes) * manifest.error.rounding
        ours, theirs = (
            float(block.targets.label_logprob.astype(np.float64).sum()) for block in (new, old)
        )
        assert abs(ours - theirs) <= slack + 1e-3


@pytest.mark.parametrize("form", ["arrow", "zarr"])
def test_an_interrupted_operation_is_continued(
    stores: Callable[..., str], folder: Path, tmp_path: Path, form: str
) -> None:
    path, whole = stores("both", "compact", form), tmp_path / "whole"
    retokenize(path, str(whole), folder / "added")
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    suffix = open_store(part).manifest.make_store(part).suffix
    (part / commit_name(1)).unlink()
    gone = part / shard_name(1, suffix)
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    retokenize(path, str(part), folder / "added")
    assert digests(part) == digests(whole)
    line = refusal(retokenize, path, str(part), folder / "removed")
    assert "made differently: tokenizer." in line


def test_a_chunk_has_the_summed_log_probability_of_the_teachers_labels(
    folder: Path, tmp_path: Path
) -> None:
    old = text_store(tmp_path / "old", folder / "bytes", TEXTS, Capture(tail=9))
    retokenize(str(tmp_path / "old"), str(tmp_path / "new"), folder / "added")
    new = everything(tmp_path / "new")
    pairs = matched(old, new, loaded(folder / "bytes"), loaded(folder / "added"))
    summed = 0
    for (first, row), (after, following) in itertools.pairwise(pairs):
        if following != row + 1:
            continue  # labels between them are left out
        inside = old.targets.label_logprob[first:after].astype(np.float64)
        ends = labels(new.sequences)[row] == loaded(folder / "added").token_to_id(END)
        wanted = inside[0] if ends else inside.sum()
        assert new.targets.label_logprob[row] == np.float32(wanted)
        summed += not ends and len(inside) > 1
    assert summed > 15


def test_a_token_that_is_learned_in_part_is_not_learned(folder: Path, tmp_path: Path) -> None:
    """As where a prompt ends inside a token of the student."""
    teacher, student = loaded(folder / "bytes"), loaded(folder / "added")
    ids = np.array(teacher.encode("at the 12").ids, np.int32)
    for begin, wanted in ((2, ["Ġthe", "Ġ", "12"]), (3, ["Ġ", "12"]), (8, [])):
        learned = np.arange(len(ids)) >= begin
        whole = TokenizedDocument(1, ids, np.ones(len(ids), np.bool_))
        sequences = build_sequences(0, [[TokenizedDocument(0, ids, learned), whole]])
        capture = Capture(tail=5)
        targets, _ = random_records(0, labels(sequences), capture, teacher.get_vocab_size())
        block = Block(sequences=sequences, targets=targets, capture=capture)
        path = tmp_path / str(begin)
        text_store(path, folder / "bytes", block, capture)
        manifest = retokenize(str(path), f"{path}-new", folder / "added")
        new = everything(f"{path}-new")
        names = [student.id_to_token(int(i)) for i in labels(new.sequences)]
        assert names == [*wanted, "t", "Ġthe", "Ġ", "12"]
        assert manifest.retokenized is not None
        lost = len(ids) - begin - sum(len(name) for name in wanted)
        assert manifest.retokenized.counts["left_labels"] == lost


def test_numerals_of_one_token_are_chunks_of_digits(folder: Path, tmp_path: Path) -> None:
    text_store(tmp_path / "old", folder / "teacher", TEXTS, Capture(tail=400))
    retokenize(str(tmp_path / "old"), str(tmp_path / "new"), folder / "removed")
    old, new = everything(tmp_path / "old"), everything(tmp_path / "new")
    teacher, student = loaded(folder / "teacher"), loaded(folder / "removed")
    at_old = [teacher.id_to_token(int(i)) for i in labels(old.sequences)]
    at_new = [student.id_to_token(int(i)) for i in labels(new.sequences)]
    numerals = [i for i, name in enumerate(at_old) if name == "123"]
    digits = [
        i for i in range(len(at_new) - 2)
        if at_new[i : i + 3] == ["1", "2", "3"] and new.targets.chunk_sizes[i, 0] == 3
    ]  # fmt: skip
    assert len(numerals) == len(digits) == 2  # the first token of a document is not a label
    for one, other in zip(numerals, digits, strict=True):
        assert new.targets.label_logprob[other] == old.targets.label_logprob[one]
        assert (new.targets.label_logprob[other + 1 : other + 3] == 0).all()
        # all numerals of the teacher add up at their first digit
        tail = old.targets.tail.take(np.array([one]))
        ones = sum(
            int(count)
            for index, count in zip(tail.ids, tail.counts, strict=True)
            if teacher.id_to_token(int(index)).startswith("1")
        )
        made = new.targets.tail.take(np.array([other]))
        found = made.counts[made.ids == student.token_to_id("1")].sum()
        assert int(found) == ones
        assert ones > 0


def test_pieces_with_a_space_in_front_of_every_text_are_aligned_both_ways(
    folder: Path, tmp_path: Path
) -> None:
    texts = ["the the un", "un the 12", "xé the", "1 2"]
    for ours, theirs, end in (("teacher", "pieces", END), ("pieces", "bytes", "</s>")):
        path = tmp_path / ours
        block = text_store(path, folder / ours, texts, Capture(tail=9), end=end)
        retokenize(str(path), str(path) + "-new", folder / theirs)
        assert not list(verify(str(path) + "-new"))
        new = everything(str(path) + "-new")
        student = loaded(folder / theirs)
        tokens = [student.id_to_token(int(i)) for i in new.sequences.tokens[0]]
        assert tokens[0] == ("▁the" if theirs == "pieces" else "t")
        last = "</s>" if theirs == "pieces" else END
        assert tokens.count(last) == len(block.sequences.document_starts[0])
        assert (new.targets.chunk_sizes[:, 0] > 0).sum() > 12


def test_a_document_that_is_cut_inside_a_character_keeps_its_bytes(
    folder: Path, tmp_path: Path
) -> None:
    teacher = loaded(folder / "bytes")
    ids = np.array(teacher.encode("at 東京").ids, np.int32)
    first, second = ids[:5], ids[4:]  # inside 東, with one token in common
    made = [[TokenizedDocument(0, part, np.ones(len(part), np.bool_))] for part in (first, second)]
    sequences = build_sequences(0, made)
    capture = Capture(tail=5)
    targets, _ = random_records(0, labels(sequences), capture, teacher.get_vocab_size())
    block = Block(sequences=sequences, targets=targets, capture=capture)
    text_store(tmp_path / "old", folder / "bytes", block, capture)
    for name, lost in (("teacher", 0), ("characters", 4)):
        manifest = retokenize(str(tmp_path / "old"), str(tmp_path / name), folder / name)
        assert manifest.retokenized is not None
        assert manifest.retokenized.counts["lost_bytes"] == lost
        new = everything(tmp_path / name)
        assert texts_of(new, loaded(folder / name))[1].endswith("京")
        assert len(new.targets) > 0


def test_special_tokens_map_by_role_by_name_or_as_told(folder: Path, tmp_path: Path) -> None:
    teacher = byte_pairs(MERGES, extra=["<|user|>", "<|tool|>"])
    saved(tmp_path / "chat", teacher)
    student = byte_pairs(ADDED, end="</s>", extra=["<|user|>", "<|system|>"])
    saved(tmp_path / "student", student, end="</s>")
    text = "<|user|>the 12<|tool|>un"
    text_store(tmp_path / "old", tmp_path / "chat", [text] * 3, Capture(tail=5))
    old = str(tmp_path / "old")
    line = refusal(retokenize, old, str(tmp_path / "no"), tmp_path / "student")
    assert (
        "sequence 0, document 0, token 4: the special token '<|tool|>' has no counterpart" in line
    )
    assert not (tmp_path / "no").exists()
    for told, wanted in (("<|system|>", ["<|system|>"]), ("12", ["12"]), ("", [])):
        new = tmp_path / f"new{len(wanted)}{told[:1]}"
        retokenize(old, str(new), tmp_path / "student", Decisions(special={"<|tool|>": told}))
        assert not list(verify(str(new)))
        tokens = [student.id_to_token(int(i)) for i in everything(new).sequences.tokens[0]]
        own = student.encode("the 12", add_special_tokens=False).tokens
        after = student.encode("un", add_special_tokens=False).tokens
        assert tokens[: tokens.index("</s>") + 1] == ["<|user|>", *own, *wanted, *after, "</s>"]
    line = refusal(
        retokenize, old, str(tmp_path / "no"), tmp_path / "student", Decisions(special={"12": "x"})
    )
    assert "'12' is not one of its special tokens" in line


def test_names_of_special_tokens_in_a_text_stay_text(folder: Path, tmp_path: Path) -> None:
    student = byte_pairs(ADDED, end="</s>")
    saved(tmp_path / "student", student, end="</s>")
    text_store(tmp_path / "old", folder / "teacher", ["the </s> 12"] * 2, Capture(tail=5))
    retokenize(str(tmp_path / "old"), str(tmp_path / "new"), tmp_path / "student")
    tokens = everything(tmp_path / "new").sequences.tokens[0].tolist()
    assert tokens.count(student.token_to_id("</s>")) == 2


def test_what_cannot_be_aligned_is_refused_in_one_line(
    stores: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    path, new = stores(), str(tmp_path / "new")
    lower = byte_pairs(MERGES, order=4)
    lower.normalizer = normalizers.Lowercase()
    saved(tmp_path / "lower", lower)
    text_store(tmp_path / "upper", folder / "teacher", ["the cat", "the Cat"], Capture(tail=5))
    line = refusal(retokenize, str(tmp_path / "upper"), new, tmp_path / "lower", named="lower")
    assert (
        f"{tmp_path}/upper: sequence 0, document 1: lower does not reproduce its text at byte"
        in line
    )
    assert "at byte 4, near 'the Cat'" in line
    assert "(unaligned = skip)" in line
    unknown = byte_pairs(MERGES, order=5)
    unknown.decoder = None
    saved(tmp_path / "unknown", unknown)
    line = refusal(retokenize, path, new, tmp_path / "unknown", named="it")
    assert line.startswith("it: the bytes of its tokens cannot be known")
    (tmp_path / "empty").mkdir()
    assert "no tokenizer.json" in refusal(retokenize, path, new, tmp_path / "empty", named="it")
    line = refusal(retokenize, path, new, folder / "added", Decisions(ambiguous="bucket"))
    assert "needs a record without samples" in line
    words: Any = models.WordLevel({"[UNK]": 0, "x": 1}, unk_token="[UNK]")
    saved(tmp_path / "words", Tokenizer(words))
    assert "cannot be known" in refusal(retokenize, path, new, tmp_path / "words")
    assert refusal(retokenize, path, path, folder / "added").endswith("choose another place")
    assert not Path(new).exists()
    retokenize(path, new, folder / "added")
    line = refusal(retokenize, new, str(tmp_path / "again"), folder / "bytes")
    assert "holds the tokens of a student" in line
    shutil.copytree(path, tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare" / "tokenizer")
    line = refusal(retokenize, str(tmp_path / "bare"), str(tmp_path / "no"), folder / "bytes")
    assert "has no tokenizer" in line


def test_labels_without_a_log_probability_are_refused(
    stores: Callable[..., str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = everything(stores())
    missing = block.targets.label_logprob.copy()
    missing[3] = np.nan
    broken = replace(block, targets=replace(block.targets, label_logprob=missing))
    monkeypatch.setattr(StoreReader, "batches", lambda self, size: iter([broken]))
    line = refusal(retokenize, stores(), str(tmp_path / "new"), folder / "added")
    assert "labels without a log-probability" in line
    assert not (tmp_path / "new").exists()


def test_texts_that_are_not_reproduced_can_be_left_out_of_training(
    folder: Path, tmp_path: Path
) -> None:
    lower = byte_pairs(MERGES, order=4)
    lower.normalizer = normalizers.Lowercase()
    saved(tmp_path / "lower", lower)
    text_store(tmp_path / "old", folder / "teacher", ["the cat", "the Cat"], Capture(tail=5))
    manifest = retokenize(
        str(tmp_path / "old"), str(tmp_path / "new"), tmp_path / "lower",
        Decisions(unaligned="skip"),
    )  # fmt: skip
    assert not list(verify(str(tmp_path / "new")))
    assert manifest.retokenized is not None
    assert manifest.retokenized.counts["skipped_pieces"] == 1
    new = everything(tmp_path / "new")
    second = new.sequences.document_starts[0][1]
    assert (new.sequences.positions[0] < second).all()
    assert len(new.targets) > 3


def test_texts_that_become_longer_count_no_lost_bytes(folder: Path, tmp_path: Path) -> None:
    longer = byte_pairs(MERGES, order=4)
    longer.normalizer = normalizers.Replace("a", "aaaa")
    saved(tmp_path / "longer", longer)
    text_store(tmp_path / "old", folder / "teacher", ["the cat", "the tot"], Capture(tail=5))
    manifest = retokenize(
        str(tmp_path / "old"), str(tmp_path / "new"), tmp_path / "longer",
        Decisions(unaligned="skip"),
    )  # fmt: skip
    assert not list(verify(str(tmp_path / "new")))
    assert manifest.retokenized is not None
    assert manifest.retokenized.counts["skipped_pieces"] == 1
    assert manifest.retokenized.counts["lost_bytes"] == 0


def test_other_operations_work_on_such_stores(
    stores: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    retokenize(stores("both"), first, folder / "added")
    text_store(
        tmp_path / "old", folder / "teacher", TEXTS[::-1], CAPTURES["both"], seed=4,
        shard_sequences=2, block_sequences=1, corpus="9",
    )  # fmt: skip
    retokenize(str(tmp_path / "old"), second, folder / "added")
    both = merge([first, second], str(tmp_path / "both"), None, None)
    parts = [open_store(path).manifest.retokenized for path in (first, second)]
    assert both.retokenized is not None
    assert all(part is not None for part in parts)
    assert both.retokenized.positions == sum(part.positions for part in parts if part)
    convert(first, str(tmp_path / "compact"), "compact", "zarr")
    take(first, str(tmp_path / "part"), np.array([1, 2]))
    shrink(first, str(tmp_path / "small"), 2, 3)
    for name in ("both", "compact", "part", "small"):
        assert not list(verify(str(tmp_path / name))), name
    found = everything(tmp_path / "compact").targets.chunk_sizes
    assert np.array_equal(found, everything(first).targets.chunk_sizes)
    other = str(tmp_path / "other")
    retokenize(str(tmp_path / "old"), other, folder / "bytes")
    assert "cannot be merged" in refusal(merge, [first, other], str(tmp_path / "no"), None, None)


def test_wrong_chunks_are_found(stores: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    manifest = retokenize(stores(), str(tmp_path / "new"), folder / "removed")
    block = everything(tmp_path / "new")
    rules = Rules(
        vocabulary=manifest.tokenizer.size, sequence_length=manifest.packing.sequence_length,
        capture=manifest.capture, maximum=0.0, rounding=0.0,
    )  # fmt: skip
    assert not check_block(block, len(block), rules)
    begins = np.flatnonzero(block.targets.chunk_sizes[:, 0] > 1)
    for row, size in ((begins[0], 1), (begins[0], 9), (0, 0), (begins[0] + 1, 1), (0, 300)):
        sizes = block.targets.chunk_sizes.copy()
        sizes[row] = size
        wrong = replace(block, targets=replace(block.targets, chunk_sizes=sizes))
        found = check_block(wrong, len(block), rules)
        assert any("chunks that do not follow" in finding.what for finding in found)
    logprobs = block.targets.label_logprob.copy()
    logprobs[begins[0] + 1] = -1.0
    wrong = replace(block, targets=replace(block.targets, label_logprob=logprobs))
    found = check_block(wrong, len(block), rules)
    assert [f.what for f in found] == ["a label inside a chunk with a log-probability of its own"]


@pytest.mark.skipif(not UDHR.exists(), reason="needs the texts of ../shared")
def test_every_script_is_aligned_with_bytes_pairs_and_characters(
    folder: Path, tmp_path: Path
) -> None:
    texts: dict[str, str] = {}
    for line in UDHR.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["id"], row["text"][200:300])
    assert len(texts) > 300
    texts = dict(list(texts.items())[::6])
    saved(tmp_path / "all", characters("".join(texts.values())))
    capture = Capture(tail=9)
    teacher = Speller(folder / "teacher", "teacher")
    text_store(tmp_path / "old", folder / "teacher", [*texts.values()], capture)
    for student in (folder / "bytes", tmp_path / "all", folder / "pieces"):
        new = tmp_path / f"new-{student.name}"
        manifest = retokenize(str(tmp_path / "old"), str(new), student)
        measured = manifest.retokenized
        assert measured is not None
        assert measured.fingerprint == teacher.fingerprint
        assert measured.counts["lost_bytes"] == measured.counts["skipped_pieces"] == 0
        assert measured.counts["left_labels"] <= 2 * len(texts)
        block = everything(new)
        assert np.abs(block.targets.chunk_sizes).sum() == len(block.targets)
        if student.name != "pieces":
            found = texts_of(block, loaded(student))
            assert found == [text + END for text in texts.values()]


def test_a_store_without_label_log_probabilities_is_refused(folder: Path, tmp_path: Path) -> None:
    size = loaded(folder / "teacher").get_vocab_size()
    head_ids, head_logprobs = [[5, 6], [7, 8]], np.log([[0.5, 0.3], [0.6, 0.1]])
    for name, tokens, given in (
        ("guessed", [1, 5, 9], None),
        ("known", [1, 5, 8], None),
        ("given", [1, 5, 9], np.log([0.5, 0.01])),
    ):
        with StoreWriter(
            tmp_path / name, teacher="t", tokenizer=str(folder / "teacher"),
            capture=Capture(head=2, tail=0), sequence_length=4,
        ) as writer:  # fmt: skip
            writer.add(tokens, head_ids=head_ids, head_logprobs=head_logprobs, label_logprob=given)
        assert writer.manifest.tokenizer.size == size
        assert not list(verify(str(tmp_path / name)))
        new = str(tmp_path / f"{name}-new")
        if name == "guessed":
            line = refusal(retokenize, str(tmp_path / name), new, folder / "bytes")
            assert "was written without the log-probabilities of its labels" in line
        else:
            retokenize(str(tmp_path / name), new, folder / "bytes")


@pytest.mark.parametrize("codec", ["plain", "compact"])
def test_figures_of_distributions_leave_out_what_is_inside_a_chunk(
    stores: Callable[..., str], folder: Path, tmp_path: Path, codec: str
) -> None:
    """There the record holds an estimate, which the teacher did not give."""
    new = str(tmp_path / "new")
    manifest = retokenize(stores("head", codec), new, folder / "bytes")
    store, block = open_store(new), everything(tmp_path / "new")
    known_M = block.targets.chunk_sizes[:, 0] > 0
    assert manifest.retokenized is not None
    sums = store.statistics
    assert sums.known == sum(sums.mass_bins) == known_M.sum() < len(known_M)
    assert sums.known == manifest.retokenized.positions
    masses = np.exp(block.targets.head_logprobs[known_M].astype(np.float64)).sum()
    assert sums.head_mass == pytest.approx(masses, rel=1e-3)
    facts = describe(Subject(store=store, path=new))
    assert facts.teacher_entropy == pytest.approx(block.targets.entropy[known_M].mean(), rel=1e-3)
    right = block.targets.head_ids[:, 0] == labels(block.sequences)
    assert facts.teacher_accuracy == pytest.approx(right[known_M].mean())
    assert right[known_M].mean() != right.mean()
    assert sum(facts.entropy.positions) == sums.known
