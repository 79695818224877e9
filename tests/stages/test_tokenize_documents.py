"""Tokenizers learn from the training split; document and prompt tokens decode to their text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chats import CHAT, END, TEMPLATE
from coldstill.data.corpus.document import BadRowError, Document, is_held_out
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import CorpusConfig, TokenizerConfig
from coldstill.stages.corpus.tokenize_documents import DocumentTokenizer, PromptTokenizer
from coldstill.stages.corpus.train_tokenizer import END_OF_TEXT, train_tokenizer
from coldstill.stages.models.loading import load_tokenizer
from coldstill.stages.models.vocabulary import vocabulary_size
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
    (chat,) = tokenize(own, [Document(where="b", messages=CHAT)])  # ends as in its template
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
    assert len(covering) > len("her speaks" + END)  # this tokenizer has a token for the word
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


@pytest.fixture
def chatting(tokenizer_folder: Path) -> Any:
    """A tokenizer that a test may change."""
    tokenizer = load_tokenizer(str(tokenizer_folder), "test")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenizer_of(chatting: Any, length: int = 1024) -> PromptTokenizer:
    return PromptTokenizer(chatting, CorpusConfig(files=("a",), sequence_length=length))


def asked(chatting: Any, document: Document) -> str:
    ((_, found),) = tokenizer_of(chatting)([document], 5)
    assert found.index == 5
    assert found.tokens_T.dtype == np.int32
    assert found.learned_T.shape == found.tokens_T.shape
    assert not found.learned_T.any()
    return str(chatting.decode(found.tokens_T))


@pytest.mark.parametrize("text", ["", "and a completion"])
def test_a_prompt_is_kept_without_its_completion(text: str, chatting: Any) -> None:
    document = Document(where="a", prompt="every student ✓", text=text)
    assert asked(chatting, document) == "every student ✓"
    chatting.eos_token = None  # a prompt needs no separator
    assert tokenizer_of(chatting).separator == ()
    assert asked(chatting, document) == "every student ✓"


@pytest.mark.parametrize(
    ("turns", "last"), [((0, 5), 3), ((0, 4), 3), ((1, 3), 1), ((0, 2), 1), ((0, 1), 0)]
)
def test_a_chat_is_kept_up_to_its_last_turn_that_is_not_the_assistants(
    turns: tuple[int, int], last: int, chatting: Any
) -> None:
    messages = CHAT[turns[0] : turns[1]]
    before = "".join(f"<{m['role']}>{m['content']}{END}" for m in CHAT[turns[0] : last + 1])
    assert asked(chatting, Document(where="a", messages=messages)) == f"{before}<assistant>"
    tool = (*CHAT[1:3], {"role": "tool", "content": "42"}, CHAT[4])
    assert asked(chatting, Document(where="a", messages=tool)).endswith(f"<tool>42{END}<assistant>")


def test_a_prompt_keeps_its_own_end_but_not_that_of_the_tokenizer(chatting: Any) -> None:
    assert asked(chatting, Document(where="a", prompt=f"to learn{END}")) == f"to learn{END}"
    begin = chatting.convert_ids_to_tokens(5)
    chatting.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {END}", special_tokens=[(begin, 5), (END, chatting.eos_token_id)]
    )
    ((_, found),) = tokenizer_of(chatting)([Document(where="a", prompt="to learn")], 0)
    assert found.tokens_T[0] == 5
    assert chatting.decode(found.tokens_T[1:]) == "to learn"


def test_a_text_and_an_empty_prompt_are_refused(chatting: Any) -> None:
    with pytest.raises(ColdstillError, match=r"^a: a text, but teacher\.generate needs") as error:
        tokenizer_of(chatting)([Document(where="a", text="to learn")], 0)
    assert not isinstance(error.value, BadRowError)
    chatting.backend_tokenizer.normalizer = Strip()
    with pytest.raises(BadRowError, match=r"^a: its prompt has no tokens") as error:
        tokenizer_of(chatting)([Document(where="a", prompt="  ")], 0)
    assert error.value.kind == "empty_prompts"


def test_every_bad_prompt_is_reported(chatting: Any) -> None:
    chatting.chat_template = (
        "{{ raise_exception('no tools') if messages[0].role == 'tool' }}" + TEMPLATE
    )
    documents = [
        Document(where="a:1", prompt="as"),
        Document(where="a:2", prompt="x" * 40),
        Document(where="a:3", messages=({"role": "tool", "content": "3"},)),
        Document(where="a:4", messages=(CHAT[2],)),
        Document(where="a:5", prompt="x" * 12),
        Document(where="a:6", prompt="x" * 11),
    ]
    skipped: list[BadRowError] = []
    tokenizer = tokenizer_of(chatting, 12)
    found = tokenizer(documents, 0, skipped.append)
    assert [(document.where, one.index) for document, one in found] == [("a:1", 0), ("a:6", 1)]
    assert len(found[1][1].tokens_T) == 11  # one position is left for the answer
    assert {str(bad)[:3]: bad.kind for bad in skipped} == {
        "a:2": "too_long_prompts",
        "a:3": "unrenderable_chats",
        "a:4": "unrenderable_chats",
        "a:5": "too_long_prompts",
    }
    lines = {str(bad)[:3]: str(bad) for bad in skipped}
    assert "its prompt of 12 tokens leaves no room for an answer in sequences of 12" in lines["a:5"]
    assert "it has only messages of the assistant" in lines["a:4"]
    for one in documents[1:5]:
        with pytest.raises(BadRowError, match=rf"^{one.where}: "):
            tokenizer([one], 0)


def test_a_prompt_becomes_a_chat_if_configured(chatting: Any) -> None:
    config = CorpusConfig(files=("a",), as_chat=True)
    documents = [
        Document(where="a", prompt="every student", text="listens"),
        Document(where="b", prompt="every student"),
    ]
    for _, found in PromptTokenizer(chatting, config)(documents, 0):
        assert chatting.decode(found.tokens_T) == f"<user>every student{END}<assistant>"
    plain = tokenizer_of(chatting)
    plain(documents, 0)
    assert plain.counts == {"untemplated_pairs": 2}


def trained(folder: Path, vocabulary: int, texts: list[str], holdout: float = 0.3) -> Any:
    folder.mkdir()
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    corpus = CorpusConfig(files=("a.jsonl",), holdout=holdout)
    return train_tokenizer(folder / "out", TokenizerConfig(vocabulary=vocabulary), corpus, folder)


def test_any_text_is_encoded_and_decoded_unchanged(tmp_path: Path) -> None:
    tokenizer = trained(tmp_path / "a", 300, sentences(40))
    assert vocabulary_size(tokenizer) == 300
    assert tokenizer.eos_token == END_OF_TEXT
    loaded = load_tokenizer(str(tmp_path / "a" / "out"), "test")
    for text in (" spaced  out\n\n", "ünïcödé 🙂 ✓", "\x00\t\r", sentences(1, seed=9)[0]):
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_held_out_texts_do_not_affect_the_tokenizer(tmp_path: Path) -> None:
    texts = [f"{text} {'zyxw' * 9}" for text in sentences(40)]
    everything = trained(tmp_path / "a", 300, texts, holdout=1e-9)
    assert any("zyxw" in token for token in everything.get_vocab())
    held = [t for t in texts if is_held_out(Document(where="", text=t).digest(), 0.3)]
    plain = [t for t in sentences(40) if not is_held_out(Document(where="", text=t).digest(), 0.3)]
    assert held
    without = trained(tmp_path / "c", 300, [*held, *plain])
    assert not any("zyxw" in token for token in without.get_vocab())


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ColdstillError, match=r"gives only \d+ tokens, expected 5000; set it to "):
        trained(tmp_path / "a", 5000, sentences(5), holdout=1e-9)
    assert not (tmp_path / "a" / "out").exists()
