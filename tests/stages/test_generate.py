"""Answers and continuations follow the model's distribution and end where documents end."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import coldstill.stages.models.ends
import numpy as np
import pytest
import torch
from coldstill.data.alignment import labels
from coldstill.data.columns import check_hashes
from coldstill.data.order import uniform
from coldstill.data.prepared import Packer, TokenizedDocument, build_sequences
from coldstill.stages.capture.generate import answer, end_tokens
from coldstill.stages.config import GenerateConfig
from coldstill.stages.continuations import (
    Drawing,
    Prompt,
    choose_prompts,
    continued,
    first_sequences,
)
from coldstill.stages.export.gguf.writer import end_slots
from coldstill.stages.models.ends import (
    Ends,
    _of_store,
    measured_ends,
    own_ends,
    stop_at,
    with_end,
)
from coldstill.stages.models.output_head import OutputHead, connect_head
from conftest import VOCABULARY, make_model
from oracles import manifest_for, random_block
from transformers import GenerationConfig, LlamaConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from coldstill.data.schema import Sequences
    from numpy.typing import NDArray


LENGTHS = [1, 9, 30, 4, 17, 2, 25, 12]
NOTHING: frozenset[int] = frozenset()

families = pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])


def make_head(family: str, sureness: float = 1.0) -> OutputHead:
    """A small teacher whose padding rows have the largest logits."""
    model = make_model(family, VOCABULARY + 16)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[:VOCABULARY].mul_(sureness)
        weight[VOCABULARY:] = 20 * weight[:16]
    return connect_head(model, VOCABULARY)


def prompts_of(rows: list[NDArray[np.int32]]) -> Sequences:
    packed = [
        [TokenizedDocument(100 + i, r, np.zeros(len(r), np.bool_))] for i, r in enumerate(rows)
    ]
    return build_sequences(40, packed)


@pytest.fixture(scope="module")
def prompts() -> Sequences:
    """Prompts of different lengths."""
    random = np.random.default_rng(0)
    return prompts_of([random.integers(0, VOCABULARY, n).astype(np.int32) for n in LENGTHS])


def answers(prompts: Sequences, answered: Sequences) -> list[list[int]]:
    pairs = zip(prompts.tokens, answered.tokens, strict=True)
    assert all(a[: len(p)].tolist() == p.tolist() for p, a in pairs)
    lengths = prompts.tokens.lengths
    return [answered.tokens[row][lengths[row] :].tolist() for row in range(len(prompts))]


@torch.no_grad()
def dense(head: OutputHead, tokens: list[int]) -> torch.Tensor:
    """[V] logits after some tokens, without cache, padding or other rows."""
    logits: torch.Tensor = head.model(torch.tensor([tokens]), use_cache=False).logits
    return logits[0, -1, :VOCABULARY].double()


def generated(
    head: OutputHead,
    prompts: Sequences,
    *,
    ends: frozenset[int] = NOTHING,
    length: int = 64,
    seed: int = 3,
    **config: Any,
) -> list[list[int]]:
    settings = GenerateConfig(**{"max_new_tokens": 16, **config})
    found = answer(
        head, prompts, settings, seed=seed, ends=ends, sequence_length=length, answering="padded"
    )
    return answers(prompts, found)


@pytest.mark.slow
@families
def test_at_temperature_0_every_token_is_the_most_probable_one(
    family: str, prompts: Sequences
) -> None:
    head = make_head(family)
    found = generated(head, prompts, temperature=0.0, max_new_tokens=12)
    for prompt, answer_T in zip(prompts.tokens, found, strict=True):
        tokens = prompt.tolist()
        for _ in range(12):
            tokens.append(int(dense(head, tokens).argmax()))
        assert answer_T == tokens[len(prompt) :]
    assert generated(head, prompts, temperature=0.0, max_new_tokens=12, seed=9, top_k=2) == found
    assert generated(head, prompts, temperature=1e-30, max_new_tokens=12) == found


def expected(
    head: OutputHead, prompt: list[int], temperature: float, top_k: int, top_p: float
) -> Any:
    """[V] the requested distribution, computed densely."""
    probs = (dense(head, prompt) / temperature).softmax(0)
    order = probs.argsort(descending=True)
    if top_k:
        probs[order[top_k:]] = 0
        probs /= probs.sum()
    before = probs[order].cumsum(0) - probs[order]
    probs[order[before >= top_p]] = 0
    return (probs / probs.sum()).numpy()


def excess(seen: NDArray[np.int64], wanted: NDArray[np.float64]) -> float:
    """Pearson's chi-square in standard deviations above its expectation. Rare tokens count as
    one."""
    often = wanted >= 5
    seen, wanted = (np.append(part[often], part[~often].sum()) for part in (seen, wanted))
    there = wanted > 0
    chi = float(((seen - wanted)[there] ** 2 / wanted[there]).sum())
    freedom = int(there.sum()) - 1
    assert freedom > 3
    return float((chi - freedom) / np.sqrt(2 * freedom))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.6, 0, 1.0), (2.0, 0, 1.0), (1.0, 7, 1.0), (1.0, 0, 0.8), (1.5, 30, 0.7)],
)
def test_many_answers_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    head, count = make_head("llama", 3.0), 6000
    prompt = np.array([7, 250, 31], np.int32)
    found = generated(
        head,
        prompts_of([prompt] * count),
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    seen = np.bincount([one for (one,) in found], minlength=VOCABULARY)
    wanted = expected(head, prompt.tolist(), temperature, top_k, top_p) * count
    assert len(seen) == VOCABULARY
    assert (wanted > 0).sum() > 5
    assert not seen[wanted == 0].any()
    assert excess(seen, wanted) < 4
    # another temperature would be detected
    other = expected(head, prompt.tolist(), temperature * 1.6, top_k, top_p) * count
    assert excess(seen, other) > 5


@pytest.mark.slow
@families
def test_an_answer_does_not_depend_on_its_batch(family: str, prompts: Sequences) -> None:
    """The other rows decide the padding, and where a fuller row interrupts the others."""
    head = make_head(family, 0.5)
    for length in (64, 33):
        together = generated(head, prompts, length=length)
        for row in range(len(prompts)):
            (alone,) = generated(head, prompts.take(np.array([row])), length=length)
            assert alone == together[row]
        order = np.arange(len(prompts))[::-1]
        assert generated(head, prompts.take(order), length=length) == together[::-1]
    assert generated(head, prompts, seed=4) != generated(head, prompts, seed=3)


@pytest.mark.slow
@families
def test_an_answer_ends_at_the_first_end_token_or_when_the_sequence_is_full(
    family: str, prompts: Sequences
) -> None:
    head = make_head(family, 0.5)
    free = generated(head, prompts)
    assert [len(one) for one in free] == [16] * len(free)
    ends = frozenset({free[0][3], free[4][7], free[2][0]})
    cut = generated(head, prompts, ends=ends)
    for whole, one in zip(free, cut, strict=True):
        assert one == whole[: len(one)]
        assert len(one) == 16 or one[-1] in ends
        assert not ends & set(one[:-1])
    assert len(cut[2]) == 1
    assert {len(one) for one in cut} >= {1, 16} or len({len(one) for one in cut}) > 2
    tight = generated(head, prompts, length=31)
    assert [len(one) for one in tight] == [min(16, 31 - n) for n in LENGTHS]
    assert all(one == whole[: len(one)] for whole, one in zip(free, tight, strict=True))


def test_generation_stops_when_all_answers_have_ended(prompts: Sequences) -> None:
    head, steps = make_head("llama", 0.5), list[Any]()
    head.model.register_forward_hook(lambda *_: steps.append(1))
    free = generated(head, prompts)
    assert len(steps) == 16
    steps.clear()
    generated(head, prompts, ends=frozenset(one[2] for one in free))
    assert len(steps) <= 3


def test_generation_ends_at_once_when_it_is_stopped(prompts: Sequences) -> None:
    head, steps = make_head("llama", 0.5), list[Any]()
    head.model.register_forward_hook(lambda *_: steps.append(1))
    config = GenerateConfig(max_new_tokens=16)
    whole = answer(head, prompts, config, seed=0, ends=frozenset(), sequence_length=64)
    steps.clear()
    stopped = answer(
        head, prompts, config, seed=0, ends=frozenset(), sequence_length=64,
        answering="padded", stop=lambda: len(steps) >= 3,
    )  # fmt: skip
    assert len(steps) == 3
    for one, other in zip(answers(prompts, stopped), answers(prompts, whole), strict=True):
        assert one == other[:3]


def test_no_row_grows_beyond_the_context() -> None:
    """Learned positions end at 128; the model fails one step later."""
    head = make_head("gpt2")
    rows = [np.arange(n, dtype=np.int32) for n in (127, 3, 120)]
    found = generated(head, prompts_of(rows), length=128, max_new_tokens=200)
    assert [len(one) for one in found] == [1, 125, 8]


def test_only_the_answer_is_supervised(prompts: Sequences) -> None:
    head = make_head("llama", 0.5)
    assert len(prompts.positions.values) == 0
    config = GenerateConfig(max_new_tokens=9)
    found = answer(head, prompts, config, seed=0, ends=frozenset({11}), sequence_length=36)
    found_answers = answers(prompts, found)
    assert labels(found).tolist() == [token for one in found_answers for token in one]
    assert found.positions.lengths.tolist() == [len(one) for one in found_answers]
    assert [int(p[0]) for p in found.positions] == [n - 1 for n in LENGTHS]
    check_hashes(found)
    np.testing.assert_array_equal(found.ids, prompts.ids)
    for name in ("document_ids", "document_starts"):
        np.testing.assert_array_equal(getattr(found, name).values, getattr(prompts, name).values)
    assert found.tokens.values.dtype == np.int32


def test_generation_settings_of_a_checkpoint_are_ignored(prompts: Sequences) -> None:
    head = make_head("llama", 0.5)
    plain = generated(head, prompts)
    settings_of_checkpoint = GenerationConfig(
        do_sample=True,
        temperature=0.01,
        top_k=1,
        repetition_penalty=9.0,
        no_repeat_ngram_size=1,
        suppress_tokens=[plain[0][0], plain[1][0]],
        eos_token_id=plain[0][1],
        max_length=3,
        num_beams=4,
    )
    head.model.generation_config = settings_of_checkpoint
    assert generated(head, prompts) == plain
    assert head.model.generation_config is settings_of_checkpoint
    greedy = generated(head, prompts, temperature=0.0)
    head.model.generation_config = GenerationConfig()
    assert generated(head, prompts, temperature=0.0) == greedy


def test_nan_logits_select_tokens_of_the_vocabulary(prompts: Sequences) -> None:
    """The capture of the answer reports them; a token past the vocabulary would break it."""
    head = make_head("llama")
    with torch.no_grad():
        head.model.get_output_embeddings().weight.fill_(torch.nan)
    for temperature in (0.0, 1.0):
        found = generated(head, prompts, temperature=temperature)
        assert all(0 <= token < VOCABULARY for one in found for token in one)


def test_a_prompt_that_leaves_no_room_raises_a_value_error(prompts: Sequences) -> None:
    with pytest.raises(ValueError, match="sequence 42: a prompt of 30 tokens leaves no room in 30"):
        generated(make_head("llama"), prompts, length=30)


def test_end_tokens_are_those_of_the_checkpoint_and_of_the_tokenizer() -> None:
    cases: list[tuple[Any, int | None, set[int]]] = [
        (7, 7, {7}), ([7, 8], 0, {0, 7, 8}), (None, 5, {5}), (None, None, set()),
    ]  # fmt: skip
    for configured, own, ends in cases:
        model = SimpleNamespace(
            generation_config=GenerationConfig(eos_token_id=configured),
            config=LlamaConfig(eos_token_id=None),
        )
        assert end_tokens(model, SimpleNamespace(eos_token_id=own)) == ends


LENGTH = 64
PROMPT = Prompt(sequence=0, document=0, tokens=(5, 9, 200, 31, 7), next=(1,))
DRAWING = Drawing(seed=3, temperature=0.5, vocabulary=VOCABULARY)


class TokenStore:
    """A store of packed sequences without targets."""

    def __init__(self, lengths: Sequence[int], learned_from: Sequence[int] = ()) -> None:
        random = np.random.default_rng(0)
        self.documents = [random.integers(0, VOCABULARY, n).astype(np.int32) for n in lengths]
        packer = Packer(LENGTH, together=True)
        packed: list[list[TokenizedDocument]] = []
        for i, tokens_T in enumerate(self.documents):
            start = learned_from[i] if learned_from else 0
            learned_T = np.arange(len(tokens_T)) >= start
            packed += packer.add(TokenizedDocument(i, tokens_T, learned_T))
        self._sequences = build_sequences(0, [*packed, *packer.finish()])

    def batches(self, size: int) -> Iterator[Any]:
        for start in range(0, len(self), size):
            yield self._sequences.take(np.arange(start, min(start + size, len(self))))

    def __len__(self) -> int:
        return len(self._sequences)

    def read(self, rows: Any) -> Any:
        return type("Block", (), {"sequences": self._sequences.take(rows)})


def chosen(store: Any, count: int, seed: int = 0, *, exact: bool = False) -> list[Prompt]:
    return choose_prompts(store, count, seed, first_sequences(store) if exact else None)


@pytest.mark.parametrize("exact", [True, False], ids=["with the corpus", "without"])
def test_prompts_are_beginnings_of_documents(exact: bool) -> None:
    # a long document is cut into parts; each begins with the last token of the part before
    store = TokenStore([50, 300, 16, 64, 200, 45, 15])
    prompts = chosen(store, 20, exact=exact)
    assert {p.document for p in prompts} == {0, 1, 2, 3, 4, 5}  # the last is too short
    for prompt in prompts:
        tokens_T = store.documents[prompt.document][:LENGTH].tolist()
        half = min(32, len(tokens_T) // 2)
        assert list(prompt.tokens) == tokens_T[:half]
        # a part of a cut document ends with its sequence
        assert list(prompt.next) == tokens_T[half : half + 40]
        assert prompt.document in store.read([prompt.sequence]).sequences.document_ids.values


def test_the_corpus_recognises_a_part_far_from_its_beginning() -> None:
    # its second part stays in an open sequence while 100 others are written
    store = TokenStore([95, *[64] * 100])
    (row,) = [
        r for r in range(len(store)) if len(store.read(np.array([r])).sequences.tokens[0]) < 64
    ]
    assert row == 101
    assert row in {p.sequence for p in chosen(store, 200)}
    assert {p.sequence for p in chosen(store, 200, exact=True)} == {*range(101)}


def test_prompts_record_whether_their_document_ends() -> None:
    # sequences of 64 tokens: both of 30 in one, 90 in two, 64 fills one
    store = TokenStore([30, 30, 90, 64])
    ended = {prompt.document: prompt.ended for prompt in chosen(store, 9, exact=True)}
    rows = {p.document: store.read(np.array([p.sequence])).sequences for p in chosen(store, 9)}
    last = {d for d, s in rows.items() if int(s.document_ids[0][-1]) == d}
    assert ended == {document: document not in last for document in ended}
    assert {*ended.values()} == {True, False}


def test_the_seed_chooses_the_documents() -> None:
    store = TokenStore([60] * 40)
    first = chosen(store, 3)
    assert first == chosen(store, 3)
    assert [p.document for p in first] != [p.document for p in chosen(store, 3, seed=1)]
    assert chosen(store, 2) == first[:2]


def test_a_prompt_of_the_corpus_is_taken_whole() -> None:
    store = TokenStore([60, 60, 20], learned_from=[12, 55, 9])
    prompts = {p.document: p for p in chosen(store, 5)}
    assert {document: len(p.tokens) for document, p in prompts.items()} == {0: 12, 2: 9}
    assert list(prompts[2].next) == store.documents[2][9:].tolist()


def continuation(
    model: Any, prompt: Prompt = PROMPT, ends: frozenset[int] = frozenset()
) -> list[int]:
    (written,) = continued(model, [prompt], DRAWING, ends)
    return written


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_continuations_equal_sampling_without_a_cache(family: str) -> None:
    model = make_model(family, VOCABULARY + 16)
    with torch.no_grad():  # padding rows would be the most probable
        model.get_output_embeddings().weight[VOCABULARY:] *= 9.0
    written = continuation(model)
    assert len(written) == 40
    text = torch.tensor([[*PROMPT.tokens, *written]])
    draws = uniform(DRAWING.seed, np.full(40, PROMPT.sequence), np.arange(40, dtype=np.int32))
    for step in range(0, 40, 7):
        place = len(PROMPT.tokens) + step
        with torch.no_grad():
            logits = model(input_ids=text[:, :place], use_cache=False).logits
        probs = (logits[0, -1, :VOCABULARY].double() / 0.5).softmax(0).tolist()
        # tokens that are at least as probable take the beginning of [0, 1)
        own = probs[written[step]]
        end = sum(p for p in probs if p >= own)
        assert end - own - 1e-4 <= draws[step] <= end + 1e-4


def test_the_seed_and_the_sequence_change_the_random_numbers() -> None:
    model = make_model("llama", VOCABULARY)
    first = continuation(model)
    assert continuation(model) == first
    assert continuation(model, dataclasses.replace(PROMPT, sequence=4)) != first
    other = dataclasses.replace(DRAWING, seed=DRAWING.seed + 1)
    assert continued(model, [PROMPT], other, frozenset()) != [first]
    # near temperature 0, sampling is greedy
    cold = dataclasses.replace(DRAWING, temperature=1e-6)
    (greedy,) = continued(model, [PROMPT], cold, frozenset())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPT.tokens, *greedy]])).logits[0, 4:-1]
    assert logits.argmax(1).tolist() == greedy


def test_a_model_without_a_cache_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", VOCABULARY)
    expected = continuation(model)
    own = model.forward

    def forward(input_ids: Any, **inputs: Any) -> Any:
        return own(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(model, "forward", forward)
    assert continuation(model) == expected


def test_generation_stops_at_an_end_and_at_the_context() -> None:
    model = make_model("gpt2", VOCABULARY)
    whole = continuation(model)
    end = whole[3]
    assert continuation(model, ends=frozenset({end})) == whole[: whole.index(end) + 1]
    long = dataclasses.replace(PROMPT, tokens=tuple(i % VOCABULARY for i in range(120)))
    assert len(continuation(model, long)) == 128 - 120


EOS = 0
BREAK = 10 + 40
"""An ordinary token that stands for a line break."""


@pytest.fixture
def chatty(tokenizer: Any) -> Any:
    """A tokenizer with tokens for the ends of turns and of thoughts."""
    chatty = copy.deepcopy(tokenizer)
    chatty.add_special_tokens({"additional_special_tokens": ["<|turn_end|>", "<|part_end|>"]})
    return chatty


TURN, PART = VOCABULARY, VOCABULARY + 1


def packed(*documents: tuple[list[int], list[int]]) -> list[Sequences]:
    """Documents in one sequence: token ids, and 1 for each supervised one."""
    pieces = [
        TokenizedDocument(i, np.array(tokens, np.int32), np.array(learned, np.bool_))
        for i, (tokens, learned) in enumerate(documents)
    ]
    return [build_sequences(0, [pieces])]


def text(*tokens: int) -> tuple[list[int], list[int]]:
    """A plain document."""
    return list(tokens), [1] * len(tokens)


CHAT = ([5, 6, 7, TURN, BREAK, 5, 8, TURN], [0, 0, 1, 1, 0, 0, 1, 1])
SUPERVISED_BREAK = ([5, 6, 7, TURN, BREAK, 5, 8, TURN, BREAK], [0, 0, 1, 1, 1, 0, 1, 1, 1])
THOUGHT, CUT = ([5, 7, PART, 8, TURN], [0, 1, 1, 1, 1]), ([5, 7, PART], [0, 1, 1])
UNLEARNED = ([7, 8, EOS], [0, 0, 0])


@pytest.mark.parametrize(
    ("documents", "separator", "expected"),
    [
        pytest.param([text(7, 8, EOS), text(9, 7, 5, EOS)], (EOS,), (EOS,), id="separator"),
        pytest.param([CHAT, text(9, 9, EOS)], (EOS,), (TURN, EOS), id="turns and documents"),
        pytest.param([SUPERVISED_BREAK], (EOS,), (TURN,), id="supervised line break after a turn"),
        pytest.param([THOUGHT, THOUGHT, CUT], (EOS,), (TURN,), id="token inside answers"),
        pytest.param([text(7, EOS, 8, EOS, 9, EOS)], (EOS,), (EOS,), id="joined documents"),
        pytest.param(
            [text(7, 8, BREAK), text(8, 7, BREAK)], (BREAK,), (BREAK,), id="ordinary token"
        ),
        *(
            pytest.param([text(7, BREAK, 8, *end), text(9, BREAK, *end)], end, (TURN,), id=str(end))
            for end in ((BREAK, TURN), (TURN, BREAK), (TURN, BREAK, BREAK))
        ),
        pytest.param(
            [*[text(7, 8, EOS)] * 1001, text(7, 8, PART)], (EOS,), (EOS,), id="pieces of documents"
        ),
        pytest.param([UNLEARNED], (EOS,), (), id="nothing supervised"),
        pytest.param([], (EOS,), (), id="no documents"),
    ],
)
def test_end_tokens_are_measured_where_supervised_parts_end(
    documents: list[Any], separator: tuple[int, ...], expected: tuple[int, ...], chatty: Any
) -> None:
    sequences = packed(*documents) if documents else []
    assert measured_ends(sequences, chatty, separator) == Ends(tokens=expected)


@pytest.mark.parametrize("read", [1, 5, 32, 10**6])
def test_ends_are_measured_in_evenly_spaced_blocks_of_the_shards_that_exist(
    read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 6 * 7 + 4  # six shards of three blocks, and one of two
    manifest = manifest_for(random_block(0, rows), shard_sequences=7, block_sequences=3)
    done = [0, 2, 3, 6]
    store = SimpleNamespace(
        manifest=manifest,
        done=done,
        place=SimpleNamespace(room=None),
        block=lambda shard, number: SimpleNamespace(sequences=(shard, number)),
    )
    monkeypatch.setattr(coldstill.stages.models.ends, "_BLOCKS", read)
    blocks = [(shard, block) for shard in done for block in range(2 if shard == 6 else 3)]
    chosen = np.unique(np.linspace(0, len(blocks) - 1, min(read, len(blocks))).astype(int))
    assert list(_of_store(store)) == [blocks[place] for place in chosen]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("documents", "separator", "lack"),
    [
        ([text(7, BREAK, 8, BREAK), text(8, BREAK, BREAK)], (BREAK,), "{}, which also occurs insi"),
        (
            [text(7, 8, 50, 51), text(9, 50, 51)],
            (50, 51),
            "{}, which is 2 tokens, so no token stops",
        ),
        ([text(7, 8), text(9, 9)], (), "no token follows its documents"),
        ([text(7, 8), text(9, 9)], (EOS,), "no text ends with an end token"),
    ],
)
def test_missing_end_tokens_are_explained(
    documents: list[Any], separator: tuple[int, ...], lack: str, tokenizer: Any
) -> None:
    found = measured_ends(packed(*documents), tokenizer, separator)
    assert found.tokens == ()
    assert lack.format(repr(tokenizer.decode(list(separator)))) in found.lack


@pytest.mark.parametrize(("own", "ends"), [(None, ()), (3, (3,)), ([3, 4], (3, 4))])
@pytest.mark.parametrize("new", [(), (7,), (4, 7)])
def test_a_model_stops_at_its_own_ends_and_at_new_ones(
    own: Any, ends: tuple[int, ...], new: tuple[int, ...], tokenizer: Any
) -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config.eos_token_id = model.config.eos_token_id = own
    assert own_ends(model) == ends
    assert end_tokens(model, tokenizer) == {*ends, EOS}
    assert not stop_at(model, ends)
    assert model.generation_config.eos_token_id == own
    assert stop_at(model, new) == bool(set(new) - {*ends})
    expected = [*new, *(end for end in ends if end not in new)] if new else list(ends)
    for settings in (model.generation_config, model.config):
        found = settings.eos_token_id
        assert (found if isinstance(found, list) else [found] if found else []) == expected


def test_a_model_without_generation_settings_gets_some() -> None:
    model = make_model("gpt2", VOCABULARY)
    model.generation_config, model.config.eos_token_id = None, None
    assert stop_at(model, (7,))
    assert model.generation_config.eos_token_id == 7


def test_only_a_tokenizer_without_an_end_gets_one(chatty: Any) -> None:
    assert with_end(chatty, (TURN,)).eos_token_id == EOS
    chatty.eos_token = None
    assert with_end(chatty, ()).eos_token_id is None
    assert with_end(chatty, (TURN,)).eos_token_id == TURN


@pytest.mark.parametrize(
    ("template", "ends", "measured", "slots"),
    [
        (None, (5, 6), (), [EOS, 5, 6]),  # nothing measured: the tokenizer's own stays first
        (None, (TURN, EOS), (TURN,), [TURN, EOS]),
        (None, (TURN, EOS), (TURN, EOS), [EOS, TURN]),
        ("{{ eos_token }}", (TURN, EOS), (TURN,), [EOS, TURN]),  # the template writes it
        (None, (TURN, 5, 6, EOS), (TURN,), [TURN, EOS, 5, 6]),
    ],
)
def test_llama_cpp_gets_the_ends_in_an_order_that_keeps_the_first_useful(
    chatty: Any, template: Any, ends: Any, measured: Any, slots: list[int]
) -> None:
    chatty.chat_template = template
    assert end_slots(chatty, ends, measured) == slots
    chatty.eos_token = None
    assert end_slots(chatty, ends, measured)[0] == (measured or ends)[0]
