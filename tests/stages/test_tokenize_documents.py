"""The learned tokens of a document decode to exactly the text to learn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chats import CHAT, END, TEMPLATE
from coldstill.data.corpus.document import BadRowError, Document
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.tokenize_documents import DocumentTokenizer
from coldstill.stages.models.loading import load_tokenizer
from conftest import sentences
from tokenizers.normalizers import Strip
from tokenizers.processors import TemplateProcessing

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.prepared import TokenizedDocument


@pytest.fixture
def own(tokenizer_folder: Path) -> Any:
    """A tokenizer that a test may change."""
    return load_tokenizer(str(tokenizer_folder), "test")


def configured(separator: str | None = None, length: int = 1024) -> CorpusConfig:
    return CorpusConfig(files=("a",), separator=separator, sequence_length=length)


def tokenize(
    tokenizer: Any, documents: list[Document], separator: str | None = None, first: int = 0
) -> list[TokenizedDocument]:
    found = DocumentTokenizer(tokenizer, configured(separator))(documents, first)
    assert [document for document, _ in found] == documents
    return [tokenized for _, tokenized in found]


def learned(tokenizer: Any, document: TokenizedDocument) -> str:
    return str(tokenizer.decode(document.tokens_T[document.learned_T]))


def whole(tokenizer: Any, document: TokenizedDocument) -> str:
    return str(tokenizer.decode(document.tokens_T))


def test_plain_text_is_learned_whole_with_its_end(own: Any) -> None:
    documents = [Document(where="a", text=text) for text in [*sentences(3), "ünïcödé 🙂"]]
    found = tokenize(own, documents, first=7)
    assert [document.index for document in found] == [7, 8, 9, 10]
    for document, one in zip(documents, found, strict=True):
        assert one.tokens_T.dtype == np.int32
        assert one.learned_T.all()
        assert whole(own, one) == document.text + END


@pytest.mark.parametrize(
    ("separator", "end"), [(None, END), ("", ""), ("\n\n", "\n\n"), ("§", "§")]
)
def test_the_separator_is_the_end_of_text_or_as_configured(
    separator: str | None, end: str, own: Any
) -> None:
    assert own.decode(DocumentTokenizer(own, configured(separator)).separator) == end
    (one,) = tokenize(own, [Document(where="a", text="as it likes")], separator)
    assert whole(own, one) == "as it likes" + end
    assert len(one.tokens_T) == len(one.learned_T)


@pytest.mark.parametrize("prompt", ["", "every student"])
def test_a_tokenizer_without_an_end_needs_a_separator(prompt: str, own: Any) -> None:
    own.eos_token, own.chat_template = None, TEMPLATE
    document = Document(where="a.jsonl:3", prompt=prompt, text="as it likes")
    with pytest.raises(ColdstillError) as error:
        tokenize(own, [document])
    assert str(error.value) == (
        "corpus.separator: the tokenizer has no end-of-text token to put after a text "
        '(a.jsonl:3); set a text to put there, or "" for nothing'
    )
    for separator in ("", "\n"):
        (one,) = tokenize(own, [document], separator)
        assert whole(own, one) == f"{prompt}as it likes{separator}"
    (chat,) = tokenize(own, [Document(where="b", messages=CHAT)])  # ends as its template says
    assert whole(own, chat).endswith(f"listens{END}")


def test_an_end_that_the_text_or_the_tokenizer_already_has_is_not_added_twice(own: Any) -> None:
    (one,) = tokenize(own, [Document(where="a", text="to learn" + END)])
    assert whole(own, one) == "to learn" + END
    (one,) = tokenize(own, [Document(where="a", text="to learn\n\n")], "\n\n")
    assert whole(own, one) == "to learn\n\n"
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, own.eos_token_id)]
    )
    (one,) = tokenize(own, [Document(where="a", prompt="to learn ", text="it likes")])
    assert whole(own, one) == f"to learn it likes{END}"
    assert learned(own, one).endswith(END)


def test_a_separator_without_tokens_is_refused(own: Any) -> None:
    own.backend_tokenizer.normalizer = Strip()
    with pytest.raises(ColdstillError, match=r"^corpus\.separator: .* no tokens for ' '$"):
        DocumentTokenizer(own, configured(" "))


@pytest.mark.parametrize("completion", [" for as long", "élan ✓ vital"])
def test_only_the_completion_of_a_pair_is_learned(completion: str, own: Any) -> None:
    document = Document(where="a", prompt="every student listens", text=completion)
    (one,) = tokenize(own, [document])
    assert whole(own, one) == "every student listens" + completion + END
    assert learned(own, one) == completion + END
    assert not one.learned_T.all()


def test_a_token_with_characters_of_prompt_and_completion_is_learned(own: Any) -> None:
    """Without this token a part of the completion would not be learned."""
    (one,) = tokenize(own, [Document(where="a", prompt="the teac", text="her speaks")])
    covering = learned(own, one)
    assert covering.endswith("her speaks" + END)
    assert len(covering) > len("her speaks" + END)  # this tokenizer knows the word
    assert not one.learned_T[0]


def test_a_batch_of_chats_pairs_and_texts_keeps_its_order(own: Any) -> None:
    chat = Document(where="c", messages=CHAT)
    with pytest.raises(ColdstillError, match=r"^c: a chat, but the tokenizer has no chat template"):
        tokenize(own, [chat])
    own.chat_template = TEMPLATE
    documents = [
        Document(where="a", text="every student"),
        Document(where="b", messages=CHAT[1:3]),
        Document(where="d", prompt="as", text=" long"),
        chat,
    ]
    found = tokenize(own, documents, "\n")
    answers = f"once and for all ✓{END}"
    assert [learned(own, one) for one in found] == [
        "every student\n", answers, " long\n", f"{answers}listens{END}",
    ]  # fmt: skip
    assert [one.index for one in found] == [0, 1, 2, 3]
    text = "".join(f"<{m['role']}>{m['content']}{END}" for m in CHAT)
    assert whole(own, found[3]) == text  # without a separator after the template's end


def test_a_batch_equals_single_documents(own: Any) -> None:
    documents = [Document(where="a", text=text) for text in sentences(20)]
    together = tokenize(own, documents)
    for i, document in enumerate(documents):
        (alone,) = tokenize(own, [document], first=i)
        np.testing.assert_array_equal(alone.tokens_T, together[i].tokens_T)


def test_a_token_that_begins_in_a_header_is_learned_only_with_visible_text(own: Any) -> None:
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    answer = {"role": "assistant", "content": "once and for all"}
    (one,) = tokenize(own, [Document(where="a", messages=(CHAT[1], answer))])
    assert learned(own, one) == " once and for all\n"  # this tokenizer joins a space and a word
    # a token of white space that begins in the header belongs to the header
    own.add_tokens(["\n\n"])
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}" + END + "{% endfor %}"
    )
    answer = {"role": "assistant", "content": "\nonce"}
    (one,) = tokenize(own, [Document(where="a", messages=(CHAT[1], answer))])
    assert "assistant\n\nonce" in whole(own, one)
    assert learned(own, one) == f"once{END}"


def test_pairs_become_chats_if_configured(own: Any) -> None:
    own.chat_template = TEMPLATE
    document = Document(where="a", prompt="every student", text="listens")
    plain = DocumentTokenizer(own, configured())
    ((_, one),) = plain([document], 0)
    assert whole(own, one) == f"every studentlistens{END}"
    assert plain.counts == {"untemplated_pairs": 1}
    chats = DocumentTokenizer(own, CorpusConfig(files=("a",), as_chat=True))
    (_, one), (_, text) = chats([document, Document(where="b", text="listens")], 0)
    assert whole(own, one) == f"<user>every student{END}<assistant>listens{END}"
    assert learned(own, one) == f"listens{END}"
    assert whole(own, text) == f"listens{END}"  # a plain text stays a text
    assert +chats.counts == {"templated_pairs": 1}
    own.chat_template = None
    assert +DocumentTokenizer(own, configured()).counts == {}
    with pytest.raises(ColdstillError, match=r"^corpus\.as_chat: the tokenizer has no chat templ"):
        chats([document], 0)


def test_bad_rows_are_skipped_and_the_others_numbered_without_gaps(own: Any) -> None:
    own.chat_template = "{{ raise_exception('no tools') if messages[0].role == 'tool' }}" + TEMPLATE
    documents = [
        Document(where="a:1", text="every student"),
        Document(where="a:2", messages=({"role": "tool", "content": "3"}, *CHAT[1:])),
        Document(where="a:3", messages=CHAT),
        Document(where="a:4", prompt="x" * 40, text="y"),
        Document(where="a:5", text="z" * 80),
    ]
    tokenizer = DocumentTokenizer(own, configured(length=40))
    skipped: list[BadRowError] = []
    found = tokenizer(documents, 7, skipped.append)
    assert [document.where for document, _ in found] == ["a:1", "a:3", "a:5"]
    assert [tokenized.index for _, tokenized in found] == [7, 8, 9]
    assert [(bad.kind, str(bad)[:3]) for bad in skipped] == [
        ("unrenderable_chats", "a:2"), ("too_long_prompts", "a:4"),
    ]  # fmt: skip
    with pytest.raises(BadRowError, match=r"^a:2: "):
        tokenizer(documents, 7)


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_must_begin_in_the_first_piece(chat: bool, own: Any) -> None:
    own.chat_template = TEMPLATE
    document = Document(where="a:4", prompt="every student ", text="listens for long")
    if chat:
        document = Document(where="a:4", messages=CHAT)
    (one,) = tokenize(own, [document])
    before = int(np.argmax(one.learned_T))  # ids of the prompt
    assert 1 < before < len(one.tokens_T) - 2
    # room for one token of the answer is enough; the rest is cut as in any document
    for length in (len(one.tokens_T) + 1, before + 1):
        ((_, kept),) = DocumentTokenizer(own, configured(length=length))([document], 0)
        np.testing.assert_array_equal(kept.tokens_T, one.tokens_T)
    with pytest.raises(BadRowError) as error:
        DocumentTokenizer(own, configured(length=before))([document], 0)
    assert str(error.value) == (
        f"a:4: its prompt of {before} tokens leaves no room for an answer in sequences of {before};"
        " shorten it, raise corpus.sequence_length, or skip such rows with corpus.bad_rows = "
        '"skip"'
    )
