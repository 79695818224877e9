"""Caches of other projects as stores, against the dense distributions that they were made from."""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from caches import K, Known, fitted, known, vllm
from coldstill.data.alignment import labels
from coldstill.data.imports import FORMATS, importing
from coldstill.data.imports.importing import Importer
from coldstill.data.maintenance.foreign import export
from coldstill.data.maintenance.merge import merge
from coldstill.data.store.reader import open_store
from coldstill.stages.models.final_head import FinalHead
from conftest import VOCABULARY, make_model
from imported import Made, imported, request, run, written
from refusals import refusal
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def cache(tokenizer: Any) -> Known:
    return known(tokenizer)


EXPECTED: dict[str, tuple[str, str, str, bool]] = {
    "distillkit": ("distillkit", "next", "logprobs", True),
    "distillkit-delta": ("distillkit", "next", "logprobs", True),
    "distillkit-normal": ("distillkit", "next", "logprobs", True),
    "legacy": ("distillkit-legacy", "next", "logprobs", True),
    "legacy-logits": ("distillkit-legacy", "next", "logits", False),
    "raw": ("raw", "next", "logprobs", True),
    "raw-kept": ("raw", "next", "renormalised", False),
    "raw-whole": ("raw", "next", "logprobs", True),
    "prepared-own": ("axolotl", "own", "renormalised", False),
    "prepared-next": ("axolotl", "next", "renormalised", False),
    "axolotl-raw": ("axolotl", "own", "logprobs", True),
    "vllm": ("vllm", "own", "logprobs", True),
    "maxtext": ("maxtext", "next", "logits", False),
    "megatron": ("megatron", "next", "logprobs", True),
}
"""Format, alignment and kind of values that are found, and whether the mass is known."""
LOSS = {"legacy": 0.02, "legacy-logits": 0.02, "megatron": 0.01}
"""Largest error of a log-probability by the source's codec; else that of float32."""


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_row_is_the_teachers_head_after_its_token(
    kind: str, cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Ids equal, log-probabilities within the codec's rounding, mass where the source has it; what
    the source is was measured."""
    made = imported(written(kind, cache, tmp_path), tmp_path / "store", tokenizer)
    found = made.imported
    assert (found.format, found.alignment, found.values, made.manifest.capture.mass) == EXPECTED[
        kind
    ]
    assert found.measured[found.alignment] > 3 * max(
        score for name, score in found.measured.items() if name not in (found.alignment, "rows")
    )
    targets, sequences = made.block.targets, made.block.sequences
    by_text = {ids.tobytes(): number for number, ids in enumerate(cache.tokens)}
    heads = made.manifest.capture.head
    checked = 0
    for row in range(len(made.block)):
        tokens, starts = sequences.tokens[row], sequences.document_starts[row].tolist()
        own = slice(*sequences.positions.offsets[row : row + 2].tolist())
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            text = tokens[start:stop].astype(np.int64)
            document = by_text.get(text.tobytes())
            if document is None:  # Megatron's sequences are the first tokens of the documents
                document = next(
                    n for n, ids in enumerate(cache.tokens) if (ids[: len(text)] == text).all()
                )
            for index in range(own.start, own.stop):
                position = int(sequences.positions.values[index])
                if start <= position < stop:
                    _expect_row(made, targets, index, cache, document, position - start, kind)
                    checked += 1
    answers = sum(len(ids) - 1 for ids in cache.tokens)
    if kind.startswith(("prepared", "axolotl")):
        answers = sum(len(ids) - 5 for ids in cache.tokens)
    assert checked == len(targets) == (160 if kind == "megatron" else answers)
    assert heads == (4 if kind == "vllm" else K)


def _expect_row(
    made: Made, targets: Any, index: int, cache: Known, document: int, row: int, kind: str
) -> None:
    head = made.manifest.capture.head
    dense = cache.logprobs[document][row]
    ids, values = cache.head(document, row, head)
    entries = 9 if kind == "megatron" and row % 3 == 0 else head
    if kind.startswith("distillkit"):
        wanted = fitted(values, delta=kind.endswith("delta"), normal=kind.endswith("normal"))
    else:
        wanted = np.array(values)
    found = targets.head_logprobs[index]
    stored = dict(zip(targets.head_ids[index].tolist(), found.tolist(), strict=True))
    assert set(targets.head_ids[index, :entries].tolist()) == set(ids[:entries])
    if not made.manifest.capture.mass:
        wanted = wanted - np.log(np.exp(wanted).sum())
    for each, value in list(zip(ids, wanted, strict=True))[:entries]:
        assert stored[each] == pytest.approx(value, abs=LOSS.get(kind, 2e-5) + 2e-5)
    label = int(cache.tokens[document][row + 1])
    if made.manifest.capture.mass:
        mass = 1.0 - np.exp(np.array(list(stored.values()))).sum()
        assert np.exp(targets.log_tail[index]) == pytest.approx(mass, abs=1e-5)
        if kind == "vllm":
            assert targets.label_logprob[index] == pytest.approx(dense[label], abs=1e-5)
        elif label not in ids:
            assert targets.label_logprob[index] <= found[-1] + 1e-6


def test_whole_distributions_give_heads_samples_and_temperatures(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """A .kld file: exact to half a level; the samples average to the rest of the distribution."""
    source = written("kld", cache, tmp_path)
    options: dict[str, Any] = {"head": 3, "tail": 40, "temperatures": (2.0,)}
    made = imported(source, tmp_path / "store", tokenizer, **options)
    targets = made.block.targets
    dense = np.concatenate([logp[10:19] for logp in cache.logprobs])
    own = np.concatenate([ids[11:20] for ids in cache.tokens])
    np.testing.assert_array_equal(labels(made.block.sequences), own)
    level = 16.0 / 65535
    ids = np.argsort(-dense, axis=1, kind="stable")[:, :3]
    at_head = np.take_along_axis(dense, targets.head_ids.astype(int), 1)
    np.testing.assert_allclose(targets.head_logprobs, at_head, atol=level)
    assert (np.sort(targets.head_ids, 1) == np.sort(ids, 1)).mean() > 0.95
    rest = dense.copy()
    np.put_along_axis(rest, targets.head_ids.astype(int), -np.inf, 1)
    np.testing.assert_allclose(np.exp(targets.log_tail), np.exp(rest).sum(1), atol=1e-4)
    at_label = dense[np.arange(len(own)), own]
    np.testing.assert_allclose(targets.label_logprob, at_label, atol=level)
    np.testing.assert_allclose(targets.entropy, -(np.exp(dense) * dense).sum(1), atol=2e-3)
    norm = np.log(np.exp(dense / 2).sum(1))
    np.testing.assert_allclose(targets.log_norm[:, 0], norm, atol=3e-3)
    drawn = np.zeros(dense.shape)
    np.add.at(drawn, (targets.tail.rows(), targets.tail.ids), targets.tail.counts / 40)
    expected = np.exp(rest) / np.exp(rest).sum(1, keepdims=True)
    assert np.abs(drawn - expected).max() <= 1 / 40 + 1e-6  # systematic: never one draw off
    np.testing.assert_allclose(drawn.mean(0), expected.mean(0), atol=0.02)


def test_settings_of_a_source_change_how_it_is_read(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Prepared values that were divided by a temperature, a raw column of another name, and the
    token that llama.cpp read in place of the first one of a chunk."""
    folder = written("prepared-own", cache, tmp_path)
    plain = imported(folder, tmp_path / "plain", tokenizer)
    table = pq.read_table(folder / "prepared.parquet").to_pylist()
    for record in table:
        for row in record["target_logprobs"]:
            halved = np.array(row) / 2.0
            if np.isfinite(halved).all():
                row[:] = (halved - np.logaddexp.reduce(halved)).tolist()
    pq.write_table(pa.Table.from_pylist(table), folder / "prepared.parquet")
    made = imported(folder, tmp_path / "warm", tokenizer, config={"kd_temperature": 2.0})
    np.testing.assert_allclose(
        made.block.targets.head_logprobs, plain.block.targets.head_logprobs, atol=1e-5
    )
    folder = written("axolotl-raw", cache, tmp_path)
    file = folder / "raw.jsonl"
    file.write_text(file.read_text().replace('"logprobs"', '"of_server"'))
    options: dict[str, Any] = {"format": "axolotl", "config": {"logprobs_field": "of_server"}}
    assert len(imported(folder, tmp_path / "named", tokenizer, **options).block) == len(
        cache.tokens
    )
    folder = written("kld", cache, tmp_path)
    made = imported(folder, tmp_path / "bos", tokenizer, config={"bos": 1})
    assert {int(tokens[0]) for tokens in made.block.sequences.tokens} == {1}
    wanted = request(folder, tmp_path / "no", tokenizer, config={"bos": VOCABULARY})
    assert "--config: bos = 320: expected a whole number from 0 to 319" in refusal(run, wanted)


def test_columns_beside_give_borders_padding_and_supervision(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Two documents in a record by numbers in the attention mask or by positions; padding on both
    sides; tokens that a mask leaves out. Rows keep their tokens through all of it."""
    one, two = cache.tokens[0], cache.tokens[1]
    left, right, hidden = 3, 2, 4
    tokens = np.concatenate([one, two])
    heads = [cache.head(0, row) for row in range(len(one))]
    heads += [cache.head(1, row) for row in range(len(two))]
    base = {
        "input_ids": tokens.tolist(),
        "token_ids": [ids for ids, _ in heads],
        "top_values": [values for _, values in heads],
        "title": "not read",
    }
    pad = ([0] * left, [0] * right)
    filler = ([heads[0][0]] * left, [heads[0][0]] * right)
    values = ([heads[0][1]] * left, [heads[0][1]] * right)
    mask = [0] * hidden + [1] * (len(tokens) - hidden)
    records = {
        "numbers": base | {"attention_mask": [1] * len(one) + [2] * len(two)},
        "positions": base | {"position_ids": [*range(len(one)), *range(len(two))]},
        "padding": base
        | {
            "input_ids": pad[0] + base["input_ids"] + pad[1],
            "token_ids": filler[0] + base["token_ids"] + filler[1],
            "top_values": values[0] + base["top_values"] + values[1],
            "attention_mask": pad[0] + [1] * len(tokens) + pad[1],
        },
        "loss mask": base | {"loss_mask": mask},
    }
    plain = base | {"attention_mask": [1] * len(tokens)}
    for name, record in records.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist([record] * 3), folder / "rows.parquet")
        made = imported(folder, tmp_path / f"store-{folder.name}", tokenizer)
        assert "columns that are not read: title" in made.said
        sequences = made.block.sequences
        assert sequences.tokens[0].tolist() == plain["input_ids"]
        positions = sequences.positions[0].tolist()
        if name in ("numbers", "positions"):
            assert sequences.document_starts[0].tolist() == [0, len(one)]
            assert len(one) - 1 not in positions
            assert made.manifest.packing.together
        else:
            assert sequences.document_starts[0].tolist() == [0]
        if name == "loss mask":
            assert positions == list(range(hidden - 1, len(tokens) - 1))
        for place, position in enumerate(positions):
            assert made.block.targets.head_ids[place].tolist() == heads[position][0]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_hidden_states_give_the_distributions_of_the_teachers_own_head(
    before: bool, suffix: str, tokenizer: Any, tmp_path: Path
) -> None:
    """The head and norm of a saved model, applied to states that were taken before or after the
    norm; the model's own logits are the truth. Rows past the vocabulary are left out."""
    model = make_model("llama", VOCABULARY + 16, seed=5)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)  # a teacher that expects its own words
    model.save_pretrained(tmp_path / "teacher")
    folder = tmp_path / "states"
    folder.mkdir()
    random, truth, texts = torch.Generator().manual_seed(0), [], []
    for number in range(3):
        ids = torch.tensor([[7 + number]])
        for _ in range(30):
            logits = model(ids, use_cache=False).logits[0, -1, :VOCABULARY]
            ids = torch.cat([ids, logits.softmax(0).multinomial(1, generator=random)[None]], 1)
        last = []
        hook = model.model.norm.register_forward_hook(
            lambda _, given, out: last.append(given[0] if before else out)  # noqa: B023
        )
        logits = model(ids, use_cache=False).logits[0, :, :VOCABULARY].detach()
        hook.remove()
        truth.append(logits.double().log_softmax(1)[:-1].numpy())
        texts.append(ids[0].numpy())
        states = last[0][0].detach()
        if suffix == "safetensors":
            several = torch.stack([states * 0, states], 1).contiguous()
            save_file({"token_ids": ids[0].contiguous(), "hidden_states": several},
                      folder / f"hs_{number}.safetensors")  # fmt: skip
        else:
            torch.save({"input_ids": ids, "hidden_states": states[None],
                        "loss_mask": torch.ones_like(ids)}, folder / f"{number}.pt")  # fmt: skip
    head = FinalHead(str(tmp_path / "teacher"), "--teacher", VOCABULARY)
    made = imported(
        folder, tmp_path / "store", tokenizer, head=6, tail=10, logits_of=head, accept_text=True
    )
    when = "before" if before else "after"
    assert made.imported.settings == {"last_state": f"{when} the final norm"}
    dense = np.concatenate(truth)
    own = np.concatenate([ids[1:] for ids in texts])
    targets = made.block.targets
    np.testing.assert_array_equal(labels(made.block.sequences), own)
    np.testing.assert_allclose(
        targets.head_logprobs, np.take_along_axis(dense, targets.head_ids.astype(int), 1), atol=1e-4
    )
    np.testing.assert_allclose(targets.head_logprobs[:, 0], dense.max(1), atol=1e-4)
    np.testing.assert_allclose(targets.label_logprob, dense[np.arange(len(own)), own], atol=1e-4)
    for damage, expected in ((b"x" * 50, ""), (b"", "the file is empty")):
        next(folder.iterdir()).write_bytes(damage)
        wanted = request(folder, tmp_path / "bad", tokenizer, logits_of=head)
        assert expected in refusal(run, wanted)
        assert not (tmp_path / "bad").exists()
    message = refusal(run, request(folder, tmp_path / "bad", tokenizer, format="hidden-states"))
    assert "mean nothing without the teacher's final norm and head" in message or "empty" in message


def test_imports_of_one_teacher_can_be_merged(cache: Known, tokenizer: Any, tmp_path: Path) -> None:
    """Their sources and counts are joined; another teacher, or a captured store, is refused."""
    half = len(cache.tokens) // 2
    parts = [Known(cache.tokens[:half], cache.logprobs[:half]),
             Known(cache.tokens[half:], cache.logprobs[half:])]  # fmt: skip
    for name, part in zip("ab", parts, strict=True):
        imported(
            written("raw", part, tmp_path / name),
            tmp_path / f"s{name}",
            tokenizer,
            sequence_length=80,
        )
    stores = [str(tmp_path / "sa"), str(tmp_path / "sb")]
    merge(stores, str(tmp_path / "both"), None, None)
    found = open_store(tmp_path / "both")
    assert len(found) == len(cache.tokens)
    assert found.manifest.imported is not None
    assert len(found.manifest.imported.source) == 2
    imported(tmp_path / "b/raw", tmp_path / "sc", tokenizer, teacher="another", sequence_length=80)
    message = refusal(merge, [stores[0], str(tmp_path / "sc")], str(tmp_path / "x"), None, None)
    assert "only stores of one teacher can be merged" in message


@pytest.mark.parametrize(
    ("source", "kind", "settings"),
    [
        ("raw", "raw", {}),
        ("prepared-own", "axolotl", {}),
        ("kld", "kld", {"tail": 8, "shard_tokens": 60}),
    ],
)
def test_shards_and_a_restart_give_the_same_store(
    source: str, kind: str, settings: Any, cache: Known, tokenizer: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Killed in the third shard and continued, byte for byte."""
    folder = written(source, cache, tmp_path)
    options: dict[str, Any] = {"shard_tokens": 200, "format": kind, **settings}
    whole = imported(folder, tmp_path / "whole", tokenizer, **options)
    assert whole.manifest.shards >= 3
    wanted = request(folder, tmp_path / "cut", tokenizer, **options)
    importer = Importer(wanted, _interrupted_after(2), lambda sentence: None)
    with pytest.raises(KeyboardInterrupt):
        importer.run()
    assert not (tmp_path / "cut/manifest.json").exists()
    assert list((tmp_path / "cut/shards").glob("*.json"))
    changed = replace(wanted, teacher="another")
    with pytest.raises(Exception, match="holds an import with other settings: teacher = ''"):
        run(changed)
    run(wanted)
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file():
            other = tmp_path / "cut" / file.relative_to(tmp_path / "whole")
            assert other.read_bytes() == file.read_bytes(), file
    said: list[str] = []
    run(wanted, said)
    assert said == [f"already done: {tmp_path / 'cut'}"]


@pytest.mark.parametrize("searched", [1 << 24, 3])
def test_records_that_repeat_others_are_counted_across_shards(
    searched: int, cache: Known, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are compared at a time. Records that could not be used repeat nothing."""
    monkeypatch.setattr(importing, "_SEARCHED", searched)
    one, again = len(cache.tokens), 3
    many = Known(cache.tokens + cache.tokens[:again], cache.logprobs + cache.logprobs[:again])
    file = written("raw", many, tmp_path) / "rows.parquet"
    records = pq.read_table(file).to_pylist()
    for record in (1, 4, 5):  # the first of these is repeated
        records[record]["input_ids"][3] = VOCABULARY + 1
    pq.write_table(pa.Table.from_pylist(records), file)
    options: dict[str, Any] = {"shard_tokens": 200, "bad_rows": "skip"}
    made = imported(file.parent, tmp_path / "store", tokenizer, **options)
    assert made.manifest.shards > 2
    assert len(made.block) == one + again
    what = "records that repeat another one, kept"
    assert made.imported.counts[what] == again - 1
    assert f"{again - 1} {what}" in made.said


@pytest.mark.parametrize(("kind", "code"), [("<u2", 8), ("<i4", 4)])
@pytest.mark.parametrize("whole", [True, False])
def test_megatron_takes_the_tokens_from_its_own_data_set(
    whole: bool, kind: str, code: int, cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Sequences as the trainer reads them, or documents of any length that it cuts; damage to
    either file is one line."""
    length = 20
    texts = [ids[: length + 1].copy() for ids in cache.tokens]
    for before, text in itertools.pairwise(texts):
        text[0] = before[-1]  # pieces share a token
    joined = Known(texts, cache.logprobs)
    folder = written("megatron", joined, tmp_path)
    expected = imported(folder, tmp_path / "expected", tokenizer, accept_text=True).block
    stream = np.concatenate([texts[0], *(text[1:] for text in texts[1:]), [5, 6, 7]])
    parts = texts if whole else np.split(stream, [9, 50, 51, 130])
    lengths = np.array([len(part) for part in parts], "<i4")
    size = np.dtype(kind).itemsize
    firsts = ((np.cumsum(lengths) - lengths) * size).astype("<i8")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(parts), len(parts) + 1)
    index += lengths.tobytes() + firsts.tobytes() + np.arange(len(parts) + 1).tobytes()
    (tmp_path / "set.idx").write_bytes(index)
    (tmp_path / "set.bin").write_bytes(np.concatenate(parts).astype(kind).tobytes())
    for ending in ("idx", "bin"):
        options: dict[str, Any] = {"tokens": (str(tmp_path / f"set.{ending}"),)}
        options["accept_text"] = True
        found = imported(folder, tmp_path / f"by-{ending}", tokenizer, **options).block
        np.testing.assert_array_equal(found.sequences.hashes, expected.sequences.hashes)
        np.testing.assert_array_equal(found.targets.head_ids, expected.targets.head_ids)
    for ending, content, message in (
        ("bin", b"", "set.bin: is cut short"),
        ("idx", index[:60], "set.idx: is cut short"),
        ("idx", b"x" * 100, "set.idx: is not the index of a data set"),
    ):
        (tmp_path / f"set.{ending}").write_bytes(content)
        wanted = request(folder, tmp_path / "bad", tokenizer, **options)
        assert message in refusal(run, replace(wanted, tokens=(str(tmp_path / "set.idx"),)))
        assert not (tmp_path / "bad").exists()


def _changed(file: Path, change: Callable[[list[dict[str, Any]]], object]) -> None:
    records = [json.loads(line) for line in file.read_text().splitlines()]
    change(records)
    file.write_text("\n".join(map(json.dumps, records)) + "\n")


def test_vllm_records_of_different_k_keep_their_heads(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Another record with a smaller k cuts no head, and an entry of -inf is none."""
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    vllm(wide, cache, k=9)
    vllm(narrow, cache, k=4)

    def impossible(records: list[dict[str, Any]]) -> None:
        row = records[0]["prompt_logprobs"][5]
        [last] = [entry for entry in row.values() if entry["rank"] == 9]
        last["logprob"] = -np.inf

    _changed(wide / "out.jsonl", impossible)
    both = (wide / "out.jsonl").read_text() + (narrow / "out.jsonl").read_text()
    (wide / "out.jsonl").write_text(both)
    made = imported(wide, tmp_path / "store", tokenizer)
    assert made.manifest.capture.head == 9
    targets, half = made.block.targets, len(made.block.targets) // 2
    filled = "rows with fewer entries than the head, filled up"
    assert made.imported.counts[filled] == half + 1
    rows = [(n, row) for n, ids in enumerate(cache.tokens) for row in range(len(ids) - 1)]
    for index, (document, row) in enumerate(rows):
        head = set(cache.head(document, row, 9)[0])
        assert len(head & set(targets.head_ids[index].tolist())) >= (9 if index != 4 else 8)
        own = cache.head(document, row, 4)[0]
        assert targets.head_ids[half + index, :4].tolist() == own


@pytest.mark.parametrize("suffix", ["jsonl.gz", "ndjson.zst"])
@pytest.mark.parametrize("kind", ["vllm", "axolotl-raw"])
def test_json_lines_may_be_compressed(
    kind: str, suffix: str, cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    folder = written(kind, cache, tmp_path)
    whole = imported(folder, tmp_path / "whole", tokenizer).block
    [file] = folder.iterdir()
    content = file.read_bytes()
    file.unlink()
    with pa.CompressedOutputStream(
        str(folder / f"rows.{suffix}"), {"gz": "gzip", "zst": "zstd"}[suffix.rpartition(".")[2]]
    ) as stream:
        stream.write(content)
    packed = imported(folder, tmp_path / "packed", tokenizer).block
    np.testing.assert_array_equal(packed.sequences.hashes, whole.sequences.hashes)
    np.testing.assert_array_equal(packed.targets.head_logprobs, whole.targets.head_logprobs)


def test_rows_of_the_whole_vocabulary_lost_no_mass(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    records = [
        {"input_ids": ids.tolist(),
         "token_ids": cache.heads(n, VOCABULARY)[0], "top_values": cache.heads(n, VOCABULARY)[1]}
        for n, ids in enumerate(cache.tokens)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(records), folder / "rows.parquet")
    made = imported(folder, tmp_path / "store", tokenizer)
    assert (made.imported.values, made.manifest.capture.mass) == ("logprobs", True)
    assert made.imported.lost == ()
    assert np.isneginf(made.block.targets.log_tail).all()


def _interrupted_after(blocks: int) -> Any:
    calls = []

    def notify(positions: int, records: int) -> None:
        calls.append(positions)
        if len(calls) > blocks:
            raise KeyboardInterrupt

    return notify


@pytest.mark.parametrize("kind", ["distillkit", "axolotl"])
def test_a_store_written_for_another_trainer_comes_back_equal(
    kind: str, cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    """Tokens, positions and heads, through the other project's format and our import of it."""
    first = imported(written("raw", cache, tmp_path), tmp_path / "a", tokenizer)
    assert export(str(tmp_path / "a"), str(tmp_path / kind), kind) == len(cache.tokens)
    again = imported(tmp_path / kind, tmp_path / "b", tokenizer)
    assert again.imported.format == kind
    np.testing.assert_array_equal(again.block.sequences.hashes, first.block.sequences.hashes)
    for name in ("head_ids", "head_logprobs", "log_tail", "label_logprob"):
        found, wanted = (getattr(made.block.targets, name) for made in (again, first))
        np.testing.assert_array_equal(found, wanted, err_msg=name)


def test_a_format_that_loses_the_samples_is_refused_unless_asked_for(
    cache: Known, tokenizer: Any, tmp_path: Path
) -> None:
    source = written("kld", cache, tmp_path)
    imported(source, tmp_path / "both", tokenizer, head=3, tail=9)
    imported(source, tmp_path / "samples", tokenizer, head=0, tail=9)
    both, to = str(tmp_path / "both"), str(tmp_path / "to")
    message = refusal(export, both, to, "axolotl")
    assert "no place for its 9 samples of a position, which make the record unbiased" in message
    assert "keeps no head" in refusal(export, str(tmp_path / "samples"), to, "axolotl", lossy=True)
    imported(source, tmp_path / "warm", tokenizer, head=3, tail=0, temperatures=(2.0,))
    message = refusal(export, str(tmp_path / "warm"), to, "axolotl")
    assert "no place for what makes its temperatures exact (2.0)" in message
    message = refusal(export, both, to, "distillkit", lossy=True)
    assert "distillkit has no mask, but a document of 20 tokens has 9 supervised" in message
    assert not (tmp_path / "to").exists()
    assert export(both, to, "axolotl", lossy=True) == len(cache.tokens)
    assert "exists already" in refusal(export, both, to, "axolotl", lossy=True)
    again = imported(tmp_path / "to", tmp_path / "again", tokenizer)
    assert again.manifest.capture.head == 3
    assert len(again.block.targets) == 9 * len(cache.tokens)


def test_every_format_is_listed() -> None:
    assert {kind for kind, *_ in EXPECTED.values()} | {"kld", "hidden-states"} == set(FORMATS)
    assert all(FORMATS[name].name == name for name in FORMATS)
    assert VOCABULARY < 512  # nine bits in `caches`
