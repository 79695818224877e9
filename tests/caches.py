"""Caches as other projects write them, of a small teacher whose whole distributions are known.

Every writer is slow and obvious: bits are strings, and rows are dictionaries.
"""

from __future__ import annotations

import io
import json
import struct
import tarfile
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import VOCABULARY, sentences

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

K = 12


@dataclass(frozen=True)
class Known:
    """Documents with the teacher's distribution after each token."""

    tokens: list[NDArray[np.int64]]
    logprobs: list[NDArray[np.float64]]
    """[T, V] row t is about token t + 1."""

    def head(self, document: int, row: int, k: int = K) -> tuple[list[int], list[float]]:
        """The k most probable tokens and their log-probabilities."""
        logp = self.logprobs[document][row]
        ids = np.argsort(-logp, kind="stable")[:k]
        return ids.tolist(), logp[ids].tolist()

    def heads(self, document: int, k: int = K) -> tuple[list[list[int]], list[list[float]]]:
        """The heads of all rows but the last, which is about no token."""
        rows = [self.head(document, row, k) for row in range(len(self.tokens[document]) - 1)]
        return [ids for ids, _ in rows], [values for _, values in rows]


def known(tokenizer: Any, count: int = 8, seed: int = 0) -> Known:
    """Documents under a teacher that thinks of random tokens, but most of the next one."""
    random = np.random.default_rng(seed)
    texts = [np.array(tokenizer(text)["input_ids"]) for text in sentences(60, seed)]
    chosen = [ids for ids in texts if len(ids) > 20][:count]
    logprobs = []
    for ids in chosen:
        logits = 2.0 * random.normal(size=(len(ids), VOCABULARY))
        logits[np.arange(len(ids) - 1), ids[1:]] += random.normal(5.0, 3.0, len(ids) - 1)
        logprobs.append(logits - np.log(np.exp(logits).sum(1, keepdims=True)))
    return Known(chosen, logprobs)


def bits_of(numbers: list[int], width: int) -> bytes:
    """Numbers as one string of bits, most significant first, padded to whole bytes."""
    text = "".join(format(number, f"0{width}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))


DISTILLKIT = {
    "d": VOCABULARY + 1, "k": K, "exact_k": 5, "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "sqrt"], "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 3, "num_elements": 4}],
    "delta_encoding": False, "normalize_t": False,
}  # fmt: skip


def distillkit(folder: Path, cache: Known, *, delta: bool = False, normal: bool = False) -> None:
    """`data_0.parquet` and its configuration; the values of the fit are in `fitted`."""
    config = {**DISTILLKIT, "delta_encoding": delta, "normalize_t": normal}
    rows = []
    for document, tokens in enumerate(cache.tokens):
        ids, values = cache.heads(document)
        packed = [list(bits_of(row, 9)) for row in ids]
        coded = [list(_coded(np.array(row), delta, normal)[0]) for row in values]
        rows.append({"input_ids": tokens.tolist(), "compressed_logprobs": coded,
                     "bytepacked_indices": packed})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_0.parquet")
    (folder / "compression_config.json").write_text(json.dumps(config))


def fitted(values: list[float], *, delta: bool = False, normal: bool = False) -> NDArray[Any]:
    """What the bytes of a row of `distillkit` mean."""
    return _coded(np.array(values), delta, normal)[1]


def _coded(values: NDArray[Any], delta: bool, normal: bool) -> tuple[bytes, NDArray[Any]]:
    """The bytes of a row, and its values after the loss of the codec."""
    wanted = np.diff(values, prepend=0.0) if delta else values
    wanted = wanted.astype(np.float32)
    t = np.linspace(0, 1, K - 5) if normal else np.arange(K - 5.0)
    basis = np.stack([t**0, t, np.sqrt(t)])
    terms = np.linalg.lstsq(basis.T, wanted[5:].astype(np.float64), rcond=None)[0]
    terms = terms.astype(np.float32)
    tail = (terms.astype(np.float64) @ basis).astype(np.float32)
    residual = wanted[5:9] - tail[:4]
    scale = np.float16(max(1e-3, np.abs(residual).max() / 3))
    levels = np.clip(np.round(residual / np.float32(scale)), -4, 3).astype(int)
    tail[:4] += levels * np.float32(scale)
    content = wanted[:5].tobytes() + terms.tobytes() + scale.tobytes()
    content += bits_of([int(level) + 4 for level in levels], 3)
    decoded = np.concatenate([wanted[:5], tail])
    return content, np.cumsum(decoded) if delta else decoded


def legacy(folder: Path, cache: Known, *, shift: float = 0.0) -> None:
    """Words of ids, exact values as float16, a polynomial; with `shift` the values are logits."""
    config = {"vocab_size": VOCABULARY, "k": K, "exact_k": 8, "polynomial_degree": 3,
              "with_sqrt_term": True, "invert_polynomial": True}  # fmt: skip
    rows = []
    a = np.arange(1.0, K - 8 + 1)
    basis = np.stack([a**-i for i in range(4)] + [np.sqrt(a)])
    for document, tokens in enumerate(cache.tokens):
        ids, values = cache.heads(document)
        words, exact, terms = [], [], []
        for row_ids, row in zip(ids, values, strict=True):
            parts = [row_ids[i : i + 7] for i in range(0, K, 7)]
            words.append([sum(id_ << (9 * j) for j, id_ in enumerate(part)) for part in parts])
            exact.append((np.array(row[:8]) + shift).astype(np.float16).astype(float).tolist())
            fit = np.linalg.lstsq(basis.T, np.array(row[8:]) + shift, rcond=None)[0]
            terms.append(fit.astype(np.float32).tolist())
        rows.append({"input_ids": tokens.tolist(), "packed_indices": words,
                     "exact_values": exact, "coeffs": terms})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data_0.parquet")
    (folder / "legacy_logit_compression.json").write_text(json.dumps(config))


def raw(folder: Path, cache: Known, kind: str = "logprobs") -> None:
    """`token_ids` and `top_values`: log-probabilities, or logits with probabilities of the `kept`
    ids or the `whole` vocabulary beside them."""
    rows = []
    for document, tokens in enumerate(cache.tokens):
        ids, values = cache.heads(document)
        row = {"input_ids": tokens.tolist(), "attention_mask": [1] * len(tokens), "token_ids": ids}
        if kind == "logprobs":
            rows.append({**row, "top_values": values})
            continue
        p = np.exp(np.array(values))
        if kind == "kept":
            p = p / p.sum(1, keepdims=True)
        logits = (np.array(values) + 17.25).tolist()
        rows.append({**row, "top_values": logits, "normalized_logits": p.tolist()})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")


def prepared(folder: Path, cache: Known, alignment: str, prompt: int = 5) -> None:
    """axolotl's prepared rows, renormalised, with -inf before the answer."""
    rows = []
    for document, tokens in enumerate(cache.tokens):
        ids, values = cache.heads(document)
        p = np.exp(np.array(values))
        logp = np.log(p / p.sum(1, keepdims=True)).tolist()
        empty_ids, empty = [list(range(K))], [[-np.inf] * K]
        own = alignment == "own"
        all_ids = empty_ids + ids if own else ids + empty_ids
        all_logp = empty + logp if own else logp + empty
        labels = [-100] * prompt + tokens[prompt:].tolist()
        first = prompt if own else prompt - 1
        rows.append({"input_ids": tokens.tolist(), "labels": labels,
                     "target_token_ids": empty_ids * first + all_ids[first:],
                     "target_logprobs": empty * first + all_logp[first:]})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "prepared.parquet")


def axolotl_raw(folder: Path, cache: Known, prompt: int = 5) -> None:
    """A list of objects for each token of the answer, about that token."""
    lines = []
    for document, tokens in enumerate(cache.tokens):
        rows = []
        for place in range(prompt, len(tokens)):
            ids, values = cache.head(document, place - 1)
            rows.append([{"token": f"token_id:{i}", "logprob": v}
                         for i, v in zip(ids, values, strict=True)])  # fmt: skip
        lines.append(json.dumps({"input_ids": tokens.tolist(), "logprobs": rows}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "raw.jsonl").write_text("\n".join(lines) + "\n")


def vllm(folder: Path, cache: Known, k: int = 4) -> None:
    """The token first, then the k most probable ones unless they are the token."""
    lines = []
    for document, tokens in enumerate(cache.tokens):
        rows: list[Any] = [None]
        for place in range(1, len(tokens)):
            logp = cache.logprobs[document][place - 1]
            order = np.argsort(-logp, kind="stable").tolist()
            own = int(tokens[place])
            entries = [own, *(i for i in order[:k] if i != own)]
            rows.append({str(i): {"logprob": float(logp[i]), "rank": order.index(i) + 1,
                                  "decoded_token": "?"} for i in entries})  # fmt: skip
        lines.append(json.dumps({"prompt_token_ids": tokens.tolist(), "prompt_logprobs": rows}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "out.jsonl").write_text("\n".join(lines) + "\n")


def kld(folder: Path, cache: Known, context: int = 20) -> None:
    """Chunks of the first tokens of each document, quantised with a floor of 16 nats."""
    rows = []
    for logprobs in cache.logprobs:
        for row in range(context // 2, context - 1):
            logp = logprobs[row].astype(np.float32)
            least = np.float32(max(logp.min(), logp.max() - 16.0))
            scale = np.float32((logp.max() - least) / 65535.0)
            numbers = np.clip(np.round((logp - least) / scale), 0, 65535).astype("<u2")
            rows.append(scale.tobytes() + least.tobytes() + numbers.tobytes())
    folder.mkdir(parents=True, exist_ok=True)
    tokens = np.concatenate([ids[:context] for ids in cache.tokens]).astype("<i4")
    head = b"_logits_" + struct.pack("<iii", context, VOCABULARY, len(cache.tokens))
    (folder / "base.kld").write_bytes(head + tokens.tobytes() + b"".join(rows))


def megatron(folder: Path, cache: Known, length: int = 20) -> Path:
    """Two iterations of two micro-batches of two sequences; returns the file of their tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    number = iter(range(8))
    with tarfile.open(folder / "cp0_dp0__1.tar", "w") as tar:
        for iteration in range(2):
            payload: dict[str, list[Any]] = {"values": [], "indices_low": [], "bit_17": []}
            for _ in range(2):
                pairs = [next(number), next(number)]
                ids = np.zeros((length, 2, K), np.int64)
                values = np.zeros((length, 2, K), np.float16)
                for place, document in enumerate(pairs):
                    for row in range(length):
                        own, logp = cache.head(document, row)
                        ids[row, place], values[row, place] = own, logp
                        if row % 3 == 0:  # a nucleus that ended earlier
                            ids[row, place, 9:], values[row, place, 9:] = -1, -1000.0
                payload["values"].append(torch.tensor(values))
                payload["indices_low"].append(torch.tensor((ids & 0xFFFF).astype(np.uint16)))
                payload["bit_17"].append(torch.tensor((ids >> 16 & 1).astype(bool)))
            stream = io.BytesIO()
            torch.save(payload, stream)
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, "zstd") as packed:
                packed.write(stream.getvalue())
            content = sink.getvalue().to_pybytes()
            member = tarfile.TarInfo(f"{iteration}.pt.zst")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    file = folder.parent / "sequences.jsonl"
    lines = [json.dumps({"input_ids": ids[: length + 1].tolist()}) for ids in cache.tokens]
    file.write_text("\n".join(lines) + "\n")
    return file


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def example(features: dict[str, Any]) -> bytes:
    """A `tf.train.Example` of lists of numbers."""
    entries = b""
    for name, values in features.items():
        array = np.asarray(values)
        if array.dtype.kind == "f":
            feature = _field(2, _field(1, array.astype("<f4").tobytes()))
        else:
            feature = _field(3, _field(1, b"".join(_varint(int(v)) for v in array)))
        entries += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, entries)


def array_record(path: Path, records: list[bytes], compressed: bool = True) -> None:
    """An ArrayRecord file with one record in a chunk."""
    out = bytearray()

    def write(content: bytes) -> None:
        for byte in range(0, len(content)):
            if len(out) % 65536 == 0:
                out.extend(bytes(24))
            out.append(content[byte])

    def pack(content: bytes) -> bytes:
        if not compressed:
            return content
        packed: bytes = pa.compress(content, codec="zstd", asbytes=True)
        return _varint(len(content)) + packed

    def chunk(kind: bytes, data: bytes, count: int) -> None:
        write(bytes(8) + struct.pack("<Q", len(data)) + bytes(8) + kind
              + count.to_bytes(7, "little") + bytes(8) + data)  # fmt: skip

    def simple(record: bytes) -> None:
        sizes = pack(_varint(len(record)))
        kind = b"z" if compressed else b"\0"
        chunk(b"r", kind + _varint(len(sizes)) + sizes + pack(record), 1)

    chunk(b"s", b"", 0)
    for record in records:
        simple(record)
    footer = len(out)
    simple(b"footer")
    out.extend(bytes(-len(out) % 65536))
    postscript = _varint(1 << 3) + _varint(footer)
    postscript += _varint(2 << 3) + _varint(0x71930E704FDAE05E)
    simple(postscript)
    out.extend(bytes(-len(out) % 65536))
    path.write_bytes(out)


def maxtext(folder: Path, cache: Known) -> None:
    """Two documents in each record but the last, then padding; raw logits."""
    records = []
    for first in range(0, len(cache.tokens), 2):
        features: dict[str, list[Any]] = {"inputs": [], "targets": [], "inputs_segmentation": [],
                                          "top_k_indices": [], "top_k_logits": []}  # fmt: skip
        for segment, document in enumerate(range(first, min(first + 2, len(cache.tokens))), 1):
            tokens = cache.tokens[document]
            ids, values = cache.heads(document)
            features["inputs"] += tokens[:-1].tolist()
            features["targets"] += tokens[1:].tolist()
            features["inputs_segmentation"] += [segment] * (len(tokens) - 1)
            features["top_k_indices"] += [i for row in ids for i in row]
            features["top_k_logits"] += [v + 31.5 for row in values for v in row]
        for name in ("inputs", "targets", "inputs_segmentation"):
            features[name] += [0] * 3
        features["top_k_indices"] += [0] * 3 * K
        features["top_k_logits"] += [0.0] * 3 * K
        features["targets_segmentation"] = features["inputs_segmentation"]
        records.append(example(features))
    folder.mkdir(parents=True, exist_ok=True)
    array_record(folder / "part_0.array_record", records)


WRITERS: dict[str, Callable[[Path, Known], Any]] = {
    "distillkit": distillkit,
    "distillkit-delta": partial(distillkit, delta=True),
    "distillkit-normal": partial(distillkit, normal=True),
    "legacy": legacy,
    "legacy-logits": partial(legacy, shift=9.5),
    "raw": raw,
    "raw-kept": partial(raw, kind="kept"),
    "raw-whole": partial(raw, kind="whole"),
    "prepared-own": partial(prepared, alignment="own"),
    "prepared-next": partial(prepared, alignment="next"),
    "axolotl-raw": axolotl_raw,
    "vllm": vllm,
    "kld": kld,
    "megatron": megatron,
    "maxtext": maxtext,
}
"""Each kind of cache with its writer."""
