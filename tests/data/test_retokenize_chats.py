"""Chats in a student's tokens: supervision stays with the same text, in every script."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.alignment import labels
from coldstill.data.maintenance.retokenize import Decisions, retokenize
from coldstill.data.maintenance.verify import verify
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Block, Capture
from oracles import everything
from refusals import refusal
from retokenizing import UDHR
from spellings import byte_pairs, characters, pieces, random_records, saved, text_store
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

BEGIN, STOP, END = "<|im_start|>", "<|im_end|>", "<|end|>"
QUESTION, ANSWER = "user\n", "assistant\n"
PLAIN = ["What is it?", "é", "東京 the 123", "a  b", "नमस्ते", "שלום", "👩‍👩‍👧 ok"]


def texts() -> list[str]:
    """A line of every script of the declaration, if it is there, and hostile ones."""
    if not UDHR.exists():
        return PLAIN
    rows = map(json.loads, UDHR.read_text(encoding="utf-8").splitlines())
    found = {row["id"]: row["text"][200:240] for row in rows}
    assert len(found) > 300
    return [*PLAIN, *(text for text in found.values() if text)][::3]


def chat_block(tokenizer: Any, contents: list[str]) -> tuple[Block, list[str]]:
    """Chats of a question and an answer, of which the answer with its end is learned; and the
    learned text of each."""
    documents, learned = [], []
    for index, answer in enumerate(contents):
        ids: list[int] = []
        marks: list[bool] = []
        for text, taught in (
            (BEGIN, False), (QUESTION + contents[index - 1], False), (STOP, False), ("\n", False),
            (BEGIN, False), (ANSWER, False), (answer, True), (STOP, True),
        ):  # fmt: skip
            own = (
                [tokenizer.token_to_id(text)]
                if text in (BEGIN, STOP)
                else tokenizer.encode(text, add_special_tokens=False).ids
            )
            ids += own
            marks += [taught] * len(own)
        document = TokenizedDocument(index, np.array(ids, np.int32), np.array(marks, np.bool_))
        documents.append(document)
        learned.append(answer + STOP)
    sequences = build_sequences(0, [documents[i : i + 3] for i in range(0, len(documents), 3)])
    capture = Capture(head=4, tail=4)
    size = tokenizer.get_vocab_size()
    targets, _ = random_records(0, labels(sequences), capture, size)
    return Block(sequences=sequences, targets=targets, capture=capture), learned


def learned_texts(block: Block, tokenizer: Any) -> list[str]:
    """The text of the labels of each document."""
    found = []
    for row, tokens in enumerate(block.sequences.tokens):
        starts = block.sequences.document_starts[row].tolist()
        places = block.sequences.positions[row]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            own = places[(places >= start) & (places < end - 1)] + 1
            found.append(tokenizer.decode(tokens[own].tolist(), skip_special_tokens=False))
    return found


@pytest.mark.parametrize("name", ["bytes", "characters", "pairs", "pieces"])
def test_what_is_learned_of_a_chat_is_the_same_text_in_other_tokens(
    tmp_path: Path, name: str
) -> None:
    contents = texts()
    specials = [BEGIN, STOP]
    teacher = byte_pairs(
        [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("1", "2")], extra=specials, end=END
    )
    letters = "".join([*contents, QUESTION, ANSWER, "\n"])
    student: Any = {
        "bytes": lambda: byte_pairs([], extra=specials, end=END),
        "characters": lambda: characters(letters, end=END),
        "pairs": lambda: byte_pairs([("t", "h"), ("Ġ", "th"), ("1", "2")], extra=specials, end=END),
        "pieces": lambda: pieces(["▁", "t", "h", "th", "▁th", "e"], end="</s>"),
    }[name]()
    if name == "characters":
        student.add_special_tokens(specials)
    end = "</s>" if name == "pieces" else END
    ours, theirs = saved(tmp_path / "t", teacher, end=END), saved(tmp_path / "s", student, end=end)
    block, wanted = chat_block(teacher, contents)
    text_store(tmp_path / "old", ours, block, block.capture, end=END)
    said = None
    if name == "pieces":
        line = refusal(retokenize, str(tmp_path / "old"), str(tmp_path / "no"), theirs)
        assert "document 0, token 0: the special token '<|im_start|>' has no counterpart" in line
        assert not (tmp_path / "no").exists()
        said = {BEGIN: "", STOP: "</s>"}
    decisions = Decisions(special=said or {})
    manifest = retokenize(str(tmp_path / "old"), str(tmp_path / "new"), theirs, decisions)
    assert not list(verify(str(tmp_path / "new")))
    made = manifest.retokenized
    assert made is not None
    assert made.counts["left_labels"] == made.counts["lost_bytes"] == 0
    new = everything(tmp_path / "new")
    loaded = Tokenizer.from_file(str(theirs / "tokenizer.json"))
    found = learned_texts(new, loaded)
    if said is not None:
        wanted = [text.replace(STOP, said[STOP]) for text in wanted]
    if name == "pieces":  # its decoder takes a space away in front
        found, wanted = ([one.strip() for one in side] for side in (found, wanted))
    assert found == wanted
    before = float(block.targets.label_logprob.astype(np.float64).sum())
    after = float(new.targets.label_logprob.astype(np.float64).sum())
    assert after == pytest.approx(before, rel=1e-5)
