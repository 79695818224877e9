"""What of a document is learned decodes to exactly what was meant to be learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from chats import CHAT, END, TEMPLATE
from coldstill.data.corpus import BadRowError, Document
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import CorpusConfig
from coldstill.stages.corpus.tokenize_documents import DocumentTokenizer
from coldstill.stages.models.loading import load_tokenizer
from conftest import sentences

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.packing import TokenizedDocument


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
def test_the_separator_is_the_tokenizers_own_or_another_or_none(
    separator: str | None, end: str, own: Any
) -> None:
    assert own.decode(DocumentTokenizer(own, configured(separator)).separator) == end
    (one,) = tokenize(own, [Document(where="a", text="as it likes")], separator)
    assert whole(own, one) == "as it likes" + end
    assert len(one.tokens_T) == len(one.learned_T)


def test_a_separator_that_stands_there_already_is_not_put_twice(own: Any) -> None:
    (one,) = tokenize(own, [Document(where="a", text="to learn" + END)])
    assert whole(own, one) == "to learn" + END
    (one,) = tokenize(own, [Document(where="a", text="to learn\n\n")], "\n\n")
    assert whole(own, one) == "to learn\n\n"


@pytest.mark.parametrize("prompt", ["", "every student"])
def test_a_tokenizer_without_an_end_needs_to_be_told_what_stands_after_a_text(
    prompt: str, own: Any
) -> None:
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


def test_a_separator_without_tokens_is_refused(own: Any) -> None:
    class Mute:
        """Encodes everything to nothing."""

        ids: tuple[int, ...] = ()

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

    class Tokenizer:
        backend_tokenizer = Mute()

    with pytest.raises(ColdstillError, match=r"^corpus\.separator: .* no tokens for '§'$"):
        DocumentTokenizer(Tokenizer(), configured("§"))


@pytest.mark.parametrize("completion", [" for as long", "élan ✓ vital"])
def test_of_a_prompt_with_completion_only_the_completion_is_learned(
    completion: str, own: Any
) -> None:
    document = Document(where="a", prompt="every student listens", text=completion)
    (one,) = tokenize(own, [document])
    assert whole(own, one) == "every student listens" + completion + END
    assert learned(own, one) == completion + END
    assert not one.learned_T.all()


def test_a_token_that_covers_both_sides_of_the_border_is_learned(own: Any) -> None:
    """The merge reaches into the prompt: leaving it out would leave out text to be learned."""
    (one,) = tokenize(own, [Document(where="a", prompt="the teac", text="her speaks")])
    covering = learned(own, one)
    assert covering.endswith("her speaks" + END)
    assert len(covering) > len("her speaks" + END)  # this tokenizer knows the word
    assert not one.learned_T[0]


def test_of_a_chat_only_what_the_assistant_says_is_learned(own: Any) -> None:
    own.chat_template = TEMPLATE
    (one,) = tokenize(own, [Document(where="a", messages=CHAT)])
    said = "".join(f"<{m['role']}>{m['content']}{END}" for m in CHAT)
    assert whole(own, one) == said  # and no separator on top of the template's own
    assert learned(own, one) == f"once and for all ✓{END}listens{END}"


def test_chats_and_texts_of_one_batch_keep_their_order(own: Any) -> None:
    own.chat_template = TEMPLATE
    documents = [
        Document(where="a", text="every student"),
        Document(where="b", messages=CHAT[1:3]),
        Document(where="c", prompt="as", text=" long"),
        Document(where="d", messages=CHAT[3:]),
    ]
    found = tokenize(own, documents, "\n")
    assert [learned(own, one) for one in found] == [
        "every student\n", f"once and for all ✓{END}", " long\n", f"listens{END}",
    ]  # fmt: skip
    assert [one.index for one in found] == [0, 1, 2, 3]


def test_a_batch_says_what_single_documents_say(own: Any) -> None:
    documents = [Document(where="a", text=text) for text in sentences(20)]
    together = tokenize(own, documents)
    for i, document in enumerate(documents):
        (alone,) = tokenize(own, [document], first=i)
        np.testing.assert_array_equal(alone.tokens_T, together[i].tokens_T)


def test_a_template_that_writes_no_prompt_to_answer_is_understood(own: Any) -> None:
    own.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    (one,) = tokenize(own, [Document(where="a", messages=CHAT[1:3])])
    assert learned(own, one).endswith("once and for all ✓\n")
    assert "the teacher speaks" not in learned(own, one)


def test_a_token_that_begins_in_a_header_is_learned_with_the_text_in_it_only(own: Any) -> None:
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    said = {"role": "assistant", "content": "once and for all"}
    (one,) = tokenize(own, [Document(where="a", messages=(CHAT[1], said))])
    assert learned(own, one) == " once and for all\n"  # this tokenizer joins a space and a word
    # a token of white space that begins in the header is the header's
    own.add_tokens(["\n\n"])
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}\n{{ m.content }}" + END + "{% endfor %}"
    )
    said = {"role": "assistant", "content": "\nonce"}
    (one,) = tokenize(own, [Document(where="a", messages=(CHAT[1], said))])
    assert "assistant\n\nonce" in whole(own, one)
    assert learned(own, one) == f"once{END}"


def test_white_space_behind_the_end_of_a_turn_is_not_learned(own: Any) -> None:
    own.chat_template = TEMPLATE.replace(END, END + "\n")
    (one,) = tokenize(own, [Document(where="a", messages=CHAT)])
    assert learned(own, one) == f"once and for all ✓{END}listens{END}"


def test_prompts_and_completions_become_a_chat_where_asked(own: Any) -> None:
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
    assert whole(own, text) == f"listens{END}"  # a text is no answer
    assert +chats.counts == {"templated_pairs": 1}
    own.chat_template = None
    assert +DocumentTokenizer(own, configured()).counts == {}
    with pytest.raises(ColdstillError, match=r"^corpus\.as_chat: the tokenizer has no chat templ"):
        chats([document], 0)


def refused(tokenizer: Any, messages: tuple[dict[str, Any], ...]) -> str:
    with pytest.raises(ColdstillError) as error:
        tokenize(tokenizer, [Document(where="chats.jsonl:12", messages=messages)])
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("chats.jsonl:12: ")
    assert isinstance(error.value, BadRowError) is bool(tokenizer.chat_template)
    return str(error.value)


def test_a_chat_without_a_template_is_refused_with_its_place(own: Any) -> None:
    assert own.chat_template is None
    assert "the tokenizer has no chat template" in refused(own, CHAT)


def test_a_template_that_raises_is_quoted_with_the_chats_place(own: Any) -> None:
    own.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    assert refused(own, CHAT) == (
        "chats.jsonl:12: the chat template cannot render this chat: roles must; repair it, or skip "
        'such rows with corpus.bad_rows = "skip"'
    )
    own.chat_template = "{% for m in messages %}{{ m['content'] + 3 }}{% endfor %}"
    assert "cannot render this chat: " in refused(own, CHAT)


def test_a_template_that_drops_earlier_messages_is_refused(own: Any) -> None:
    own.chat_template = (
        "{% for m in messages[-2:] %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    )
    assert "does not write the content of message 1 (user)" in refused(own, CHAT[1:])


def test_a_template_that_drops_earlier_thoughts_is_understood(own: Any) -> None:
    """Reasoning models' templates write only the last answer with its (here empty) thoughts."""
    own.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if loop.last and m['role'] == 'assistant' %}[thoughts]{% endif %}"
        "{{ m['content'] }}" + END + "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (found,) = tokenize(own, [Document(where="a", messages=CHAT)])
    assert learned(own, found) == f"once and for all ✓{END}[thoughts]listens{END}"


def test_an_end_that_the_tokenizer_puts_itself_is_learned(own: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    own.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, own.eos_token_id)]
    )
    (found,) = tokenize(own, [Document(where="a", prompt="to learn ", text="it likes")])
    assert whole(own, found) == f"to learn it likes{END}"
    assert learned(own, found).endswith(END)


def test_bad_rows_are_left_out_one_by_one_and_the_others_numbered_without_gaps(own: Any) -> None:
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
def test_an_answer_needs_its_prompt_before_it_in_the_first_piece(chat: bool, own: Any) -> None:
    own.chat_template = TEMPLATE
    document = Document(where="a:4", prompt="every student ", text="listens for long")
    if chat:
        document = Document(where="a:4", messages=CHAT)
    (one,) = tokenize(own, [document])
    before = int(np.argmax(one.learned_T))  # ids that are read and not learned
    assert 1 < before < len(one.tokens_T) - 2
    # room for one token of the answer is enough: what follows is cut as in any document
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
