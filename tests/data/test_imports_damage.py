"""Damaged, cut and wrong sources: one line each, and nothing is left behind."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import K, Known, array_record, example, known
from coldstill.data.maintenance.verify import verify
from coldstill.data.store.reader import open_store
from conftest import VOCABULARY
from imported import request, run, written
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.imports.plan import Request


@pytest.fixture(scope="module")
def cache(tokenizer: Any) -> Known:
    return known(tokenizer)


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    """Only the beginning of a file."""

    def damage(folder: Path) -> None:
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * share)])

    return damage


def rows(change: Callable[[list[dict[str, Any]]], object], name: str = "rows.parquet") -> Any:
    """Change the records of a Parquet file."""

    def damage(folder: Path) -> None:
        table = pq.read_table(folder / name)
        records = table.to_pylist()
        change(records)
        pq.write_table(pa.Table.from_pylist(records), folder / name)

    return damage


def config(**changes: Any) -> Callable[[Path], None]:
    """Change the codec's parameters; None deletes one."""

    def damage(folder: Path) -> None:
        [file] = folder.glob("*.json")
        value = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return damage


def lines(change: Callable[[list[dict[str, Any]]], object], name: str) -> Callable[[Path], None]:
    """Change the records of a file of JSON lines."""

    def damage(folder: Path) -> None:
        file = folder / name
        records = [json.loads(line) for line in file.read_text().splitlines()]
        change(records)
        file.write_text("\n".join(map(json.dumps, records)) + "\n")

    return damage


def value(column: str, new: Any, record: int = 1, row: int = 7) -> Callable[[Any], None]:
    def change(records: list[dict[str, Any]]) -> None:
        records[record][column][row] = new

    return change


def entry(column: str, new: Any, place: int = 2) -> Callable[[Any], None]:
    def change(records: list[dict[str, Any]]) -> None:
        records[1][column][7][place] = new

    return change


def added(amount: float) -> Callable[[Any], None]:
    """Raise the log-probabilities of one row, so that they sum to more than 1."""

    def change(records: list[dict[str, Any]]) -> None:
        records[1]["top_values"][7] = [v + amount for v in records[1]["top_values"][7]]

    return change


def swapped(records: list[dict[str, Any]]) -> None:
    for record in records:
        record["token_ids"], record["top_values"] = record["top_values"], record["token_ids"]


def shuffled(records: list[dict[str, Any]]) -> None:
    """The tokens of other texts."""
    random = np.random.default_rng(0)
    for record in records:
        record["input_ids"] = random.permutation(record["input_ids"]).tolist()


def mixed(records: list[dict[str, Any]]) -> None:
    """Later records have the other alignment."""
    for record in records[4:]:
        for column in ("target_token_ids", "target_logprobs"):
            record[column] = [record[column][0], *record[column][:-1]]


def doubled(records: list[dict[str, Any]]) -> None:
    records[1]["token_ids"][7][2] = records[1]["token_ids"][7][1]


def not_the_tokens(records: list[dict[str, Any]]) -> None:
    records[1]["labels"][9] += 1


def with_bytes(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


class Dangerous:
    """What a pickle could run."""

    def __reduce__(self) -> Any:
        return (print, ("run",))


def pickled_payload(folder: Path) -> None:
    stream = io.BytesIO()
    torch.save({"values": [Dangerous()]}, stream)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(stream.getvalue())
    content = sink.getvalue().to_pybytes()
    with tarfile.open(folder / "cp0_dp0__1.tar", "w") as tar:
        member = tarfile.TarInfo("0.pt.zst")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def pickled_record(folder: Path) -> None:
    array_record(folder / "part_0.array_record", [pickle.dumps({"tokens": [1]})])


def without_targets(folder: Path) -> None:
    array_record(folder / "part_0.array_record", [example({"inputs": [1, 2]})], compressed=False)


def fewer_sequences(folder: Path) -> None:
    file = folder.parent / "sequences.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[:5]) + "\n")


CASES: dict[str, tuple[str, Any, str]] = {
    "cut parquet": ("raw", cut("rows.parquet"), "rows.parquet: cannot be read: "),
    "empty": ("raw", cut("rows.parquet", 0.0), "rows.parquet: the file is empty"),
    "cut lines": ("vllm", cut("out.jsonl"), "not valid JSON: "),
    "cut kld": ("kld", cut("base.kld"), "base.kld: is cut short: "),
    "no kld": ("kld", with_bytes("base.kld", b"x" * 400), "does not begin with _logits_"),
    "cut tar": ("megatron", cut("cp0_dp0__1.tar", 0.4), "cp0_dp0__1.tar"),
    "cut array record": ("maxtext", cut("part_0.array_record"), "cut short or damaged"),
    "bad array record": ("maxtext", with_bytes("part_0.array_record", bytes(131072)), "damaged"),
    "too few sequences": ("megatron", fewer_sequences, "sequence 6 has no tokens"),
    "pickle": ("maxtext", pickled_record, "is a pickle of an older script"),
    "features": ("maxtext", without_targets, "has no feature targets; it has inputs"),
    "dangerous pickle": ("megatron", pickled_payload, "is not a file of tensors alone"),
    "wrong k": ("distillkit", config(k=11), "but k = 11 and the other parameters of --config make"),
    "wrong bits": ("distillkit", config(d=1 << 16), "bytepacked_indices has 14 bytes at a token"),
    "wrong type": ("distillkit", config(exact_dtype="bfloat16"), "compressed_logprobs has 36 byte"),
    "no k": ("distillkit", config(k=None), "--config: has no k; it has d, "),
    "bad k": ("distillkit", config(k=-3), "--config: k = -3: expected a whole number from 1"),
    "bad dtype": ("distillkit", config(term_dtype="int9"), "term_dtype = 'int9': expected"),
    "bad terms": ("distillkit", config(polynomial_terms=["log"]), "expected powers, 'sqrt' or"),
    "misread": (
        "distillkit", config(exact_k=7, exact_dtype="bfloat16", residual_bins=[
            {"scale_dtype": "float32", "element_bits": 8, "num_elements": 2}]),
        "",
    ),
    "legacy k": ("legacy", config(exact_k=7), "exact_values has 8 numbers at a token, but"),
    "legacy bits": ("legacy", config(vocab_size=1 << 17), "packed_indices has 2 numbers at a"),
    "swapped": ("raw", rows(swapped), "ids outside the tokenizer's vocabulary of 320"),
    "nan": ("raw", rows(entry("top_values", float("nan"))), "record 2, row of token 7: numbers"),
    "infinite": ("raw", rows(entry("top_values", float("inf"))), "numbers that are not finite"),
    "missing": ("raw", rows(entry("top_values", None)), "numbers that are not finite"),
    "negative mass": ("raw", rows(added(2.0)), "record 2, row of token 7: probabilities that sum"),
    "twice": ("raw", rows(doubled), "record 2, row of token 7: an id twice in a row"),
    "id": ("raw", rows(entry("token_ids", VOCABULARY)), "ids outside the tokenizer's vocabulary"),
    "negative id": ("raw", rows(entry("token_ids", -1)), "ids outside the tokenizer's vocabulary"),
    "token": ("raw", rows(value("input_ids", 9999)), "record 2: token ids outside the tokenizer's"),
    "short row": ("raw", rows(value("token_ids", [1, 2])), "2 entries in a row in token_ids, but"),
    "shuffled": ("raw", rows(shuffled), "no alignment fits its tokens"),
    "lengths": (
        "raw", rows(lambda r: r[1]["attention_mask"].append(1)), "record 2: attention_mask has",
    ),
    "rows": ("raw", rows(lambda r: [r[1][c].extend([r[1][c][0]] * 3)
             for c in ("token_ids", "top_values")]), "more rows than tokens"),
    "no column": ("raw", rows(lambda r: [e.pop("top_values") for e in r]), "of no known format"),
    "labels": ("prepared-own", rows(not_the_tokens, "prepared.parquet"), "labels should repeat"),
    "renormalised": (
        "prepared-own",
        rows(entry("target_logprobs", -9.0, 0), "prepared.parquet"), "do not sum to 1 as those",
    ),
    "vllm entry": (
        "vllm", lines(lambda r: r[1]["prompt_logprobs"].pop(), "out.jsonl"), "rows in prompt_logp",
    ),
    "vllm label": (
        "vllm", lines(lambda r: r[1]["prompt_logprobs"].__setitem__(5, {"1": {"logprob": -1.0,
            "rank": 1}}), "out.jsonl"), "lacks that token, which vLLM always adds",
    ),
    "vllm key": (
        "vllm", lines(lambda r: r[1]["prompt_logprobs"].__setitem__(5, {"x": -1.0}), "out.jsonl"),
        "the entry 'x' is not an id with a logprob and a rank",
    ),
    "vllm negative id": (
        "vllm", lines(lambda r: r[1]["prompt_logprobs"][5].__setitem__("-1", {"logprob": -1.0,
            "rank": 2}), "out.jsonl"), "ids outside the tokenizer's vocabulary of 320",
    ),
    "vllm impossible label": (
        "vllm", lines(lambda r: r[1]["prompt_logprobs"][5][str(r[1]["prompt_token_ids"][5])]
                      .__setitem__("logprob", float("-inf")), "out.jsonl"),
        "record 2, row of token 5: a label with a log-probability above 0, or none",
    ),
    "vllm without ranks": (
        "vllm", lines(lambda r: [e.pop("rank") for x in r for row in x["prompt_logprobs"][1:]
                                 for e in row.values()], "out.jsonl"),
        "record 1: the entry ",
    ),
    "wrong terms": (
        "distillkit", config(polynomial_terms=[0, 1, 2]), "probabilities that sum to more than 1",
    ),
    "axolotl token": (
        "axolotl-raw", lines(lambda r: r[0]["logprobs"][3][1].__setitem__("token", " the"),
                             "raw.jsonl"), "token ' the' is not an id such as token_id:123",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_source_gives_one_line_and_leaves_nothing(
    case: str, cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    kind, damage, expected = CASES[case]
    folder = written(kind, cache, tmp_path)
    damage(folder)
    message = refusal(run, request(folder, tmp_path / "store", tokenizer))
    assert expected in message
    assert not (tmp_path / "store").exists()


def test_tokens_of_another_order_fit_no_alignment(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """The texts are whole, but they are not those of the rows."""
    other = Known([*cache.tokens[1:], cache.tokens[0]], cache.logprobs)
    cuts = [min(len(t), len(p)) for t, p in zip(other.tokens, other.logprobs, strict=True)]
    short = Known(
        [t[:c] for t, c in zip(other.tokens, cuts, strict=True)],
        [p[:c] for p, c in zip(other.logprobs, cuts, strict=True)],
    )
    folder = written("raw", short, tmp_path)
    message = refusal(run, request(folder, tmp_path / "store", tokenizer))
    assert "no alignment fits its tokens" in message
    assert "rows about the next token: label in" in message
    assert not (tmp_path / "store").exists()


def test_another_tokenizer_is_refused(cache: Known, tokenizer: Any, tmp_path: Path) -> None:
    """One of the same size whose ids stand for other tokens."""
    from tokenizers import Tokenizer

    table = json.loads(tokenizer.backend_tokenizer.to_str())
    names = list(table["model"]["vocab"])
    ids = np.random.default_rng(1).permutation(list(table["model"]["vocab"].values())).tolist()
    turned = dict(zip(names, ids, strict=True))
    table["model"]["vocab"] = turned
    table["added_tokens"] = []
    other = tmp_path / "other"
    other.mkdir()
    Tokenizer.from_str(json.dumps(table)).save(str(other / "tokenizer.json"))
    folder = written("raw", cache, tmp_path)
    message = refusal(run, request(folder, tmp_path / "store", str(other)))
    assert "--tokenizer is not the one of these tokens" in message
    assert not (tmp_path / "store").exists()


def test_files_of_different_alignments_are_refused(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """The first ones decide; a later one that fits another reading is named."""
    many = Known(cache.tokens * 40, cache.logprobs * 40)
    source = tmp_path / "mixed"
    for name, kind in (("a", "prepared-own"), ("b", "prepared-next")):
        folder = written(kind, many, tmp_path / name)
        source.mkdir(exist_ok=True)
        (folder / "prepared.parquet").rename(source / f"{name}.parquet")
    message = refusal(run, request(source, tmp_path / "store", tokenizer))
    assert "from here the alignment is another one than in the first records (own)" in message
    assert "b.parquet" in message


@pytest.mark.parametrize(("case", "left", "why"), [
    ("nan", -1, "skipped: numbers that are not finite"),
    ("twice", -1, "skipped: an id twice in a row"),
    ("negative mass", -1, "skipped: probabilities that sum to more than 1"),
    ("token", None, "skipped: token ids outside the tokenizer's vocabulary of 320"),
])  # fmt: skip
def test_bad_rows_can_be_skipped_and_are_counted(
    case: str, left: int | None, why: str, cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """A bad row loses its position, a bad record all of them; the other records keep numbers."""
    kind, damage, _ = CASES[case]
    folder = written(kind, cache, tmp_path)
    damage(folder)
    said: list[str] = []
    run(request(folder, tmp_path / "store", tokenizer, bad_rows="skip"), said)
    assert list(verify(str(tmp_path / "store"))) == []
    store = open_store(tmp_path / "store")
    block = store.read(np.arange(len(store)))
    whole = [len(ids) - 1 for ids in cache.tokens]
    wanted = [*whole]
    wanted[1] = 0 if left is None else whole[1] + left
    assert block.sequences.positions.lengths.tolist() == wanted
    assert block.sequences.tokens[2].tolist() == cache.tokens[2].tolist()
    assert store.manifest.imported is not None
    assert store.manifest.imported.counts[why] == 1
    assert f"1 {why}" in said


def test_a_source_of_few_rows_needs_the_alignment(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Where writers disagree and too few rows decide, the user does; a wrong answer is refused
    where the rows tell."""
    few = Known([cache.tokens[0][:12]], [cache.logprobs[0][:12]])
    folder = written("prepared-own", few, tmp_path)
    message = refusal(run, request(folder, tmp_path / "store", tokenizer))
    assert "7 rows are too few to measure the alignment" in message
    run(request(folder, tmp_path / "store", tokenizer, alignment="own"))
    assert open_store(tmp_path / "store").positions == 7
    folder = written("prepared-own", cache, tmp_path / "more")
    message = refusal(run, request(folder, tmp_path / "other", tokenizer, alignment="next"))
    assert "--alignment next does not fit" in message


def test_what_a_request_cannot_have_is_refused(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    folder = written("raw", cache, tmp_path)
    wanted: Request = request(folder, tmp_path / "store", tokenizer)

    def refused(**changes: Any) -> str:
        message = refusal(run, replace(wanted, **changes))
        assert not (tmp_path / "store").exists()
        return message

    for option, given in (
        ("--config", {"config": {"k": 3}}),
        ("--tokens", {"tokens": wanted.source}),
    ):
        assert f"{option}: --format raw does not read it" in refused(**given)
    assert "--format csv: expected one of distillkit, " in refused(format="csv")
    assert "names no file to import" in refused(source=(str(tmp_path / "none"),))
    assert "--tail: the source holds only the most probable" in refused(tail=4)
    assert "--temperature: the source holds only" in refused(temperatures=(2.0,))
    assert "the bytes mean nothing without the parameters" in refused(format="distillkit")
    run(wanted)
    assert open_store(tmp_path / "store").manifest.capture.head == K
    message = refusal(run, replace(wanted, source=(str(written("vllm", cache, tmp_path)),)))
    assert "already holds a store of something else" in message
