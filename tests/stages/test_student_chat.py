"""The chat template of a student with other tokens writes what the student learns."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import chat_templates
import numpy as np
import pytest
from chat_templates import ONE, TWO, WITH_SYSTEM, Message
from coldstill.data.alignment import labels
from coldstill.data.corpus.document import Document, refuse
from coldstill.data.errors import ColdstillError
from coldstill.data.maintenance.retokenize import Decisions
from coldstill.data.prepared import build_sequences
from coldstill.data.schema import Block, Capture
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.tokenize_documents import document_tokenizer
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.student_tokens import expect_alignable, retokenize_for, spelling_sha256
from oracles import everything
from spellings import byte_pairs, pieces, random_records, saved, text_store
from tokenizers import decoders, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.student_chat import GivenTemplate

ROLES = ["<|user|>", "<|assistant|>", "<|system|>"]
MINE = ["[U]", "[A]", "[S]"]
WRITES = dict(zip(ROLES, MINE, strict=True))
LITERAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>"
    "{% elif m.role == 'system' %}<|system|>{% else %}<|assistant|>{% endif %}\n"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATS = (ONE, TWO, WITH_SYSTEM)


def teacher_of(folder: Path, kind: str, template: str) -> Any:
    """A teacher's tokenizer with special tokens for roles and ends."""
    made = tokenizer_of(kind, ROLES, "<|end|>", "<s>")
    roles = {"bos_token": "<s>"}
    return loaded(saved(folder, made, end="<|end|>", roles=roles), template)


def tokenizer_of(kind: str, extra: list[str], end: str, begin: str) -> Any:
    """A tokenizer of a kind: of bytes, or of pieces whose space is in front of every text, of
    the first one, or of none."""
    if kind == "bytes":
        return byte_pairs([("Ġ", "t"), ("h", "e")], extra=[*extra, begin], end=end)
    made = pieces(["▁", "H", "i", "▁H", "▁Hi", "o", "re"], end=end)
    if kind in ("first", "never"):
        made.normalizer = normalizers.Replace(" ", "▁") if kind == "never" else None
        if kind == "first":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=kind)]
        )
    made.add_special_tokens([*extra, begin])
    return made


def loaded(folder: Path, template: str | None) -> Any:
    tokenizer = load_tokenizer(str(folder), "test")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def store_of(root: Path, teacher: Any, documents: list[Document]) -> Block:
    """A store of documents as stage one would tokenise them."""
    teacher.save_pretrained(root / "teacher")
    made = document_tokenizer(
        teacher, CorpusConfig(files=("x",), sequence_length=512), prompts=False
    )
    found = [one for _, one in made(documents, 0, refuse)]
    sequences = build_sequences(0, [[one] for one in found])
    capture = Capture(head=2, tail=2)
    targets, _ = random_records(0, labels(sequences), capture, len(teacher))
    block = Block(sequences=sequences, targets=targets, capture=capture)
    return text_store(root / "old", root / "teacher", block, capture, end=teacher.eos_token)


def chats(*messages: tuple[Message, ...]) -> list[Document]:
    return [Document(where=f"row {i}", messages=one) for i, one in enumerate(messages)]


def given_to(
    root: Path, student: Any, special: dict[str, str]
) -> tuple[GivenTemplate | None, Any, Block]:
    """What is told of the template, the tokenizer of the new store, and the store."""
    told: list[GivenTemplate] = []
    decisions = Decisions(special=special)
    retokenize_for(str(root / "old"), str(root / "new"), student, decisions, "it", tell=told.append)
    new = load_tokenizer(str(root / "new" / "tokenizer"), "test")
    return (told[0] if told else None), new, everything(root / "new")


@pytest.mark.parametrize("student", ["bytes", "every", "first", "never"])
@pytest.mark.parametrize("teacher", ["bytes", "every", "first"])
@pytest.mark.parametrize(
    "template", ["LITERAL", "PLAIN", "TRIMS", "THINKS", "MERGES", "NEVER_ASKS"]
)
def test_a_chat_has_the_tokens_that_the_student_learned(
    tmp_path: Path, template: str, teacher: str, student: str
) -> None:
    source = LITERAL if template == "LITERAL" else getattr(chat_templates, template)
    store_of(tmp_path, teacher_of(tmp_path / "t", teacher, source), chats(*CHATS))
    made = tokenizer_of(student, MINE, "[E]", "[B]")
    roles = {"bos_token": "[B]", "eos_token": "[E]"}
    own = loaded(saved(tmp_path / "s", made, end="[E]", roles=roles), "{{ 'its own' }}")
    given, new, block = given_to(tmp_path, own, WRITES)
    assert given is not None
    assert not given.warning, given.note
    assert own.chat_template == "{{ 'its own' }}"
    for row, messages in enumerate(CHATS):
        ids = new.apply_chat_template(list(messages), tokenize=True, return_dict=False)
        assert ids == block.sequences.tokens[row].tolist(), new.convert_ids_to_tokens(ids)
    assert set(MINE) & set(new.convert_ids_to_tokens(block.sequences.tokens.values))


def test_a_begin_of_text_that_only_the_student_has_is_part_of_its_template(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", "bytes", chat_templates.PLAIN)
    store_of(tmp_path, teacher, chats(ONE))
    made = tokenizer_of("bytes", MINE, "[E]", "[B]")
    begin = made.token_to_id("[B]")
    made.post_processor = processors.TemplateProcessing("[B] $A", None, [("[B]", begin)])
    student = loaded(saved(tmp_path / "s", made, end="[E]", roles={"bos_token": "[B]"}), None)
    given, new, block = given_to(tmp_path, student, WRITES)
    assert given is not None
    assert not given.warning, given.note
    ids = new.apply_chat_template(list(ONE), tokenize=True, return_dict=False)
    assert ids == block.sequences.tokens[0].tolist()
    assert ids.count(begin) == 1


def test_texts_and_plain_prompts_leave_a_student_its_own_template(tmp_path: Path) -> None:
    teacher = teacher_of(tmp_path / "t", "bytes", chat_templates.PLAIN)
    rows = [Document(where="1", text="Hi there"), Document(where="2", prompt="Hi", text=" there")]
    store_of(tmp_path, teacher, rows)
    made = tokenizer_of("bytes", MINE, "[E]", "[B]")
    student = loaded(saved(tmp_path / "s", made, end="[E]"), "{{ 'its own' }}")
    given, new, _ = given_to(tmp_path, student, {})
    assert given is None
    assert new.chat_template == "{{ 'its own' }}"


def test_a_template_that_cannot_be_exact_is_said(tmp_path: Path) -> None:
    # what is a special token of the student's is text for the teacher
    template = LITERAL.replace("<|user|>", "[U]").replace("<|system|>", "[S]")
    store_of(tmp_path, teacher_of(tmp_path / "t", "bytes", template), chats(ONE))
    made = tokenizer_of("bytes", MINE, "[E]", "[B]")
    student = loaded(saved(tmp_path / "s", made, end="[E]", roles={"bos_token": "[B]"}), None)
    given, _, _ = given_to(tmp_path, student, {"<|assistant|>": "[A]"})
    assert given is not None
    assert given.warning
    assert "not quite what is learned: it gives '[U]' 'W' 'h' instead of '[' 'U' ']'" in given.note


def test_whether_there_are_chats_can_be_unknown(tmp_path: Path) -> None:
    rows = [Document(where="1", prompt="Hi", text=" there")]
    store_of(tmp_path, teacher_of(tmp_path / "t", "bytes", "{{ raise_exception('no') }}"), rows)
    made = tokenizer_of("bytes", MINE, "[E]", "[B]")
    student = loaded(saved(tmp_path / "s", made, end="[E]"), "{{ 'its own' }}")
    given, new, _ = given_to(tmp_path, student, WRITES)
    assert given is not None
    assert given.warning
    assert given.note.startswith("whether the store has chats is not known")
    assert new.chat_template == "{{ 'its own' }}"


def test_every_special_token_of_the_template_without_a_counterpart_is_named(
    tmp_path: Path,
) -> None:
    teacher = teacher_of(tmp_path / "t", "bytes", LITERAL)
    student = loaded(saved(tmp_path / "s", byte_pairs([], end="[E]"), end="[E]"), None)
    with pytest.raises(ColdstillError) as error:
        expect_alignable(teacher, student, "students.a", Decisions())
    given = 'special = { "<|user|>" = TEXT, "<|assistant|>" = TEXT, "<|system|>" = TEXT }'
    assert str(error.value).endswith(given)
    expect_alignable(teacher, student, "students.a", Decisions(special=dict.fromkeys(ROLES, "x")))
    expect_alignable(teacher, student, "students.a")


def test_tokenizers_of_the_same_tokens_with_other_purposes_are_told_apart(tmp_path: Path) -> None:
    made = tokenizer_of("bytes", MINE, "[E]", "[B]")
    one, same, other = (
        loaded(saved(tmp_path / name, made, end=end), None)
        for name, end in (("1", "[E]"), ("2", "[E]"), ("3", "[A]"))
    )
    assert spelling_sha256(one) == spelling_sha256(same) != spelling_sha256(other)
    other = loaded(tmp_path / "2", "{{ 'its own' }}")
    assert spelling_sha256(one) != spelling_sha256(other)
    assert json.loads((tmp_path / "1" / "tokenizer.json").read_text())["model"]
    assert np.array_equal(one("Hi").input_ids, other("Hi").input_ids)
