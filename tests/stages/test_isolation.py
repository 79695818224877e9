"""Documents that share a sequence or a batch have the states that each of them has alone."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from bordered import BORDER, BORDERED, ScaledByTheBatch, bordered
from bordered import VOCABULARY as BORDERED_VOCABULARY
from coldstill.data.errors import ColdstillError
from coldstill.data.prepared import TokenizedDocument, build_sequences
from coldstill.data.schema import Capture
from coldstill.stages.capture.forward import capture_batch
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.evaluation.quality import label_logprobs
from coldstill.stages.models.inputs import attention_windows, model_inputs
from coldstill.stages.models.isolation import choose_isolation, length_thresholds, packs, recorded
from coldstill.stages.models.output_head import OutputHead, connect_head
from coldstill.stages.models.rotary import scale_by_document
from conftest import FAMILIES, VOCABULARY, make_model
from dense import documents
from refusals import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstill.data.schema import Sequences
    from coldstill.stages.models.inputs import Isolation
    from coldstill.stages.report import Report

LENGTH = 48
LENGTHS = [[5, 17, 1, 12], [40], [2, 2, 30], [11, 36, 1]]
"""Document lengths of each sequence; most sequences need padding."""
MODELS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")  # capped scores: transformers refuses
]


def packed(
    lengths: list[list[int]] = LENGTHS, seed: int = 0, vocabulary: int = VOCABULARY
) -> Sequences:
    """Random documents of the given lengths."""
    random = np.random.default_rng(seed)
    texts = [[random.integers(0, vocabulary, n).astype(np.int32) for n in row] for row in lengths]
    return build_sequences(
        0, [[TokenizedDocument(0, text, text >= 0) for text in row] for row in texts]
    )


def load(family: str, attention: str) -> Any:
    model = make_model(family, VOCABULARY)
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    return model


@torch.no_grad()
def hidden(model: Any, sequences: Sequences, way: Isolation) -> torch.Tensor:
    inputs = model_inputs(sequences, way, model.dtype, attention_windows(model.config))
    states: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state
    return states


@torch.no_grad()
def expect_isolated(
    model: Any, way: Isolation, sequences: Sequences, tolerance: float = 1e-5
) -> None:
    states = hidden(model, sequences, way)
    for row, start, end in documents(sequences):
        tokens = torch.from_numpy(sequences.tokens[row][start:end].astype(np.int64))
        alone = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        error = float((states[row, start:end] - alone).abs().max() / alone.abs().max())
        assert error < tolerance, (row, start, error)


@pytest.mark.parametrize(("family", "attention"), MODELS)
def test_packed_documents_have_their_own_states_and_do_not_affect_each_other(
    family: str, attention: str
) -> None:
    model, sequences = load(family, attention), packed()
    way = choose_isolation(model, VOCABULARY, LENGTH)
    assert way == "positions"
    expect_isolated(model, way, sequences)
    before = hidden(model, sequences, way)
    # without isolation the later documents differ
    tokens = torch.from_numpy(sequences.tokens[0].astype(np.int64))
    with torch.no_grad():
        leaky = model.base_model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    assert float((leaky - before[0, : len(tokens)])[22:].abs().max()) > 1e-2
    # a changed document leaves all others bit-identical
    for changed in documents(sequences):
        row, start, end = changed
        other, first = packed(), sequences.tokens.offsets[row]
        document = other.tokens.values[first + start : first + end]
        document[:] = (document + 7) % VOCABULARY
        after = hidden(model, other, "positions")
        assert not torch.equal(after[row, start:end], before[row, start:end])
        for other_row, begin, stop in documents(sequences):
            if (other_row, begin, stop) != changed:
                assert torch.equal(after[other_row, begin:stop], before[other_row, begin:stop])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_explicit_mask_isolates_too(family: str, attention: str) -> None:
    expect_isolated(load(family, attention), "mask", packed())


@pytest.mark.parametrize("way", ["positions", "mask"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
def test_a_sliding_window_shorter_than_the_sequence_is_kept(family: str, way: Isolation) -> None:
    model = make_model(family, VOCABULARY, sliding_window=8)
    assert choose_isolation(model, VOCABULARY, LENGTH) == "positions"
    expect_isolated(model, way, packed())


@pytest.mark.parametrize("window", [8, LENGTH + 1])
@pytest.mark.parametrize(
    "layers",
    [["sliding_attention"] * 2, ["sliding_attention", "full_attention"], ["full_attention"] * 2],
)
def test_a_model_that_needs_a_mask_keeps_its_windows(window: int, layers: list[str]) -> None:
    """Positions do not isolate documents in GPT-OSS, and its window is 128 tokens."""
    model = make_model("gpt_oss", VOCABULARY, sliding_window=window, layer_types=layers,
                       num_local_experts=2, num_experts_per_tok=1, head_dim=16)  # fmt: skip
    assert choose_isolation(model, VOCABULARY, LENGTH) == "mask"
    expect_isolated(model, "mask", packed())
    with pytest.raises(AssertionError):
        expect_isolated(model, "positions", packed())


class Wrapped(torch.nn.Module):
    """A model whose forward drops or changes its arguments."""

    def __init__(self, model: Any, change: Any) -> None:
        super().__init__()
        self.model, self.config, self.change = model, model.config, change
        self.dtype, self.device = model.dtype, model.device

    def forward(self, **inputs: Any) -> Any:
        return self.model(**self.change(inputs))


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Drop the arguments of these names."""

    def change(inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k not in names}

    return change


def mask_alone(inputs: dict[str, Any]) -> dict[str, Any]:
    """Follow restarted positions only together with a mask."""
    return inputs if "attention_mask" in inputs else without("position_ids")(inputs)


def cached(inputs: dict[str, Any]) -> dict[str, Any]:
    """Always keep a cache, which makes restarted positions leak."""
    return without("attention_mask")(inputs) | {"use_cache": True}


def refusing(inputs: dict[str, Any]) -> dict[str, Any]:
    raise TypeError(f"forward() got unexpected keyword arguments {sorted(inputs)}")


@pytest.mark.parametrize(
    ("change", "way"),
    [
        (without("position_ids", "attention_mask"), "single"),
        (cached, "single"),
        (refusing, "single"),
        (mask_alone, "mask"),
    ],
    ids=["ignores both", "keeps a cache", "rejects both", "follows the mask"],
)
def test_the_model_decides_how_documents_are_isolated(change: Any, way: Isolation) -> None:
    model = Wrapped(make_model("llama", VOCABULARY), change)
    assert choose_isolation(model, VOCABULARY, LENGTH) == way


def test_a_mask_that_replaces_a_sliding_window_has_it() -> None:
    model = Wrapped(make_model("mistral", VOCABULARY), mask_alone)
    for length in (64, 65, 100):
        assert choose_isolation(model, VOCABULARY, length) == "mask"


def test_a_leak_below_the_rounding_of_other_kernels_is_found() -> None:
    """Single documents may run other kernels, two batches of one shape may not."""

    class Leaking(Wrapped):
        def forward(self, **inputs: Any) -> Any:
            states = super().forward(**inputs).hidden_states[-1]
            return SimpleNamespace(hidden_states=[states + 2e-6 * states.cumsum(1)])

    model = Leaking(make_model("llama", VOCABULARY), without())
    assert choose_isolation(model, VOCABULARY, LENGTH) == "single"


class Amplifying(Wrapped):
    """Amplifies rounding ten thousand times at the given share of its tokens."""

    share = 0.25

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        states = super().forward(**inputs).hidden_states[-1]
        chosen = inputs["input_ids"][..., None] % 100 < 100 * self.share
        factor = 1e4 if self.dtype == torch.float32 else 1e2
        return SimpleNamespace(hidden_states=[torch.where(chosen, (factor * states).sin(), states)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_amplify_rounding_tell_nothing(dtype: torch.dtype) -> None:
    """As some do in a real model of a few bits."""
    model = make_model("llama", VOCABULARY).to(dtype)
    assert choose_isolation(Amplifying(model, without()), VOCABULARY, LENGTH) == "positions"
    assert choose_isolation(Amplifying(model, mask_alone), VOCABULARY, LENGTH) == "mask"
    ignoring = Amplifying(model, without("position_ids", "attention_mask"))
    assert choose_isolation(ignoring, VOCABULARY, LENGTH) == "single"
    everywhere = Amplifying(model, without())
    everywhere.share = 1.0
    assert choose_isolation(everywhere, VOCABULARY, LENGTH) == "single"


def test_a_lack_of_memory_is_not_a_property_of_the_model() -> None:
    def short(inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs["input_ids"].numel() > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return inputs

    model = Wrapped(make_model("llama", VOCABULARY), short)
    line = refusal(choose_isolation, model, VOCABULARY, LENGTH, where="teacher.model")
    assert line == (
        "teacher.model: not enough memory on cpu to test how the model reads several texts; lower "
        "corpus.sequence_length, or choose a smaller dtype or model"
    )


def test_a_recurrent_state_is_found() -> None:
    """A recurrent model accepts the arguments and lets documents see earlier ones."""

    class Recurrent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = make_model("llama", VOCABULARY).config
            self.embed = torch.nn.Embedding(VOCABULARY, 8)
            self.cells = torch.nn.GRU(8, 8, batch_first=True)
            self.dtype, self.device = torch.float32, torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return SimpleNamespace(hidden_states=[self.cells(self.embed(input_ids))[0]])

    torch.manual_seed(0)
    assert choose_isolation(Recurrent(), VOCABULARY, LENGTH) == "single"


def test_positions_restart_and_padding_is_a_separate_document() -> None:
    sequences = packed([[3, 2], [4]])
    inputs = model_inputs(sequences, "positions", torch.float32)
    assert inputs.keys() == {"input_ids", "position_ids"}
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]]
    assert inputs["input_ids"][1].tolist() == [*sequences.tokens[1].tolist(), 0]
    mask = model_inputs(sequences, "mask", torch.float32)["attention_mask"]
    assert mask.shape == (2, 1, 5, 5)
    seen = (mask[:, 0] == 0).int().tolist()
    assert seen[0] == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert seen[1][4] == [0, 0, 0, 0, 1]


ACROSS = [[5, 30, 9], [20, 17, 11], [3], [48], [16, 15], [17, 2, 16], [2, 4], [40, 7]]
"""Document lengths of each sequence, below, at and above the threshold."""
CAPTURE = Capture(head=4, tail=0)
EXPECTED = {
    "gpt_oss window": "mask",
    "llama4 queries scaled by place": "single",  # by the position in the sequence
    "bloom": "single",  # its attention bias uses positions of the sequence
    "rwkv": "single",
    "mamba": "single",
}
"""Models that do not isolate documents by positions."""
ROUNDING = {"mamba": 5e-5}
"""Long sums: one document differs by this much between two batches."""


@torch.no_grad()
def label_logprobs_alone(make: Callable[[], Any], sequences: Sequences) -> np.ndarray[Any, Any]:
    """Label log-probs of every document by a model that has read nothing else."""
    found = []
    for row, start, end in documents(sequences):
        tokens = torch.from_numpy(sequences.tokens[row][start:end].astype(np.int64))
        logits = make()(input_ids=tokens[None], use_cache=False).logits[0, :-1].double()
        found.append(logits.log_softmax(1).gather(1, tokens[1:, None])[:, 0].numpy())
    return np.concatenate(found)


def captured(teacher: Teacher, sequences: Sequences, batch: int) -> np.ndarray[Any, Any]:
    starts = range(0, len(sequences), batch)
    rows = [np.arange(start, min(start + batch, len(sequences))) for start in starts]
    parts = [capture_batch(teacher, sequences.take(some), CAPTURE) for some in rows]
    return np.concatenate([part.label_logprob for part in parts])


@pytest.mark.parametrize("name", BORDERED)
def test_a_record_equals_the_document_alone(name: str) -> None:
    model = bordered(name)
    fresh = copy.deepcopy(model)  # it has read nothing
    head = connect_head(model, BORDERED_VOCABULARY)
    isolation = choose_isolation(model, BORDERED_VOCABULARY, LENGTH)
    assert isolation == EXPECTED.get(name, "positions")
    for seed, lengths in enumerate((ACROSS, ACROSS[::-1])):
        given = lengths if packs(isolation) else [[n] for row in lengths for n in row]
        sequences = packed(given, seed, vocabulary=BORDERED_VOCABULARY)
        alone = label_logprobs_alone(lambda: copy.deepcopy(fresh), sequences)
        teacher = Teacher(head=head, isolation=isolation)
        for batch in (3, 1) if seed else (len(given), 3):
            found = captured(teacher, sequences, batch)
            assert np.abs(found - alone).max() < ROUNDING.get(name, 1e-5), (lengths, batch)
        # training and evaluation of students use the same inputs
        with torch.no_grad():
            total = label_logprobs(head, sequences, isolation)
        assert total == pytest.approx(float(alone.sum()), rel=1e-6)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_without_the_hook_a_short_document_changes_beside_a_long_one(name: str) -> None:
    sequences = packed([[9], [40]], vocabulary=BORDERED_VOCABULARY)
    alone = label_logprobs_alone(lambda: bordered(name), sequences)
    head = OutputHead(bordered(name), BORDERED_VOCABULARY)
    found = captured(Teacher(head=head, isolation="single"), sequences, 2)
    assert np.abs(found - alone)[:8].max() > 1e-3


def test_scaling_by_the_longest_text_of_a_batch_is_reported_with_its_threshold() -> None:
    reports: list[Report] = []
    choose_isolation(bordered("llama"), BORDERED_VOCABULARY, LENGTH, report=reports.append)
    assert reports == []
    model = bordered("phi3 longrope")
    choose_isolation(
        model, BORDERED_VOCABULARY, LENGTH, where="teacher.model", report=reports.append
    )
    choose_isolation(
        model, BORDERED_VOCABULARY, BORDER, where="teacher.model", report=reports.append
    )
    assert [(report.stage, report.note) for report in reports] == [
        (
            "teacher.model",
            "a 'phi3' model scales its positions by the longest text of a batch (longrope, above "
            "16 tokens): each document's are computed from its own length",
        )
    ]


def test_a_second_call_adds_no_second_hook() -> None:
    model = bordered("phi3 longrope")
    rotary = next(m for m in model.modules() if hasattr(m, "rope_type"))
    for _ in range(3):
        assert scale_by_document(model) == {"longrope": BORDER}
    assert len(rotary._forward_hooks) == 1
    assert scale_by_document(bordered("llama yarn")) == {}


def test_a_model_with_unknown_dependence_on_its_batch_gets_one_document_per_forward_pass() -> None:
    reports: list[Report] = []
    model = ScaledByTheBatch()
    isolation = choose_isolation(model, BORDERED_VOCABULARY, LENGTH, report=reports.append)
    assert isolation == "alone"
    assert recorded(isolation) == "single"
    assert [report.note for report in reports] == [
        "the output of a 'llama' model for a document depends on the other documents of its batch: "
        "one document per forward pass from here on, which is slower"
    ]
    # no text reaches the threshold
    assert choose_isolation(model, BORDERED_VOCABULARY, BORDER) == "positions"
    sequences = packed([[9], [40], [16], [17]], vocabulary=BORDERED_VOCABULARY)
    head = OutputHead(model, BORDERED_VOCABULARY, whole=True)
    alone = label_logprobs_alone(ScaledByTheBatch, sequences)
    found = captured(Teacher(head=head, isolation=isolation), sequences, 4)
    assert np.abs(found - alone).max() < 1e-5
    together = captured(Teacher(head=head, isolation="single"), sequences, 4)
    assert np.abs(together - alone).max() > 1e-3


def test_the_effect_of_a_neighbours_length_is_found_in_half_precision_too() -> None:
    model = ScaledByTheBatch()
    model.inner.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    assert choose_isolation(model, BORDERED_VOCABULARY, LENGTH) == "alone"
    scaled = bordered("phi3 longrope").to(torch.bfloat16)
    assert choose_isolation(scaled, BORDERED_VOCABULARY, LENGTH) == "positions"


def test_a_model_that_sees_the_future_is_refused() -> None:
    class Seeing(ScaledByTheBatch):
        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            output = super().forward(input_ids, **given)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
            return output

    with pytest.raises(ColdstillError, match=r"^teacher\.model: a 'llama' model sees the tokens"):
        choose_isolation(Seeing(), BORDERED_VOCABULARY, LENGTH, where="teacher.model")


def test_a_model_without_embeddings_of_tokens_that_sees_the_future_is_refused() -> None:
    """Nothing shows what the model amplifies, so the usual limit holds."""

    class Seeing(Wrapped):
        def get_input_embeddings(self) -> None:
            return None

        def forward(self, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
            return output

    model = Seeing(make_model("llama", VOCABULARY), without())
    line = refusal(choose_isolation, model, VOCABULARY, LENGTH)
    assert line.startswith("model: a 'llama' model sees the tokens that it is to predict")


def test_a_model_that_remembers_long_texts_is_refused() -> None:
    class Remembering(ScaledByTheBatch):
        longest = 1

        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            self.longest = max(self.longest, input_ids.shape[1])
            own = torch.arange(input_ids.shape[1])[None].expand(input_ids.shape)
            given["position_ids"] = given.get("position_ids", own) * (
                3 if self.longest > BORDER else 1
            )
            return self.inner(input_ids=input_ids, **given)

    with pytest.raises(ColdstillError, match="model depends on the texts of earlier calls"):
        choose_isolation(Remembering(), BORDERED_VOCABULARY, LENGTH)


def test_every_length_that_a_configuration_names_is_a_threshold() -> None:
    assert length_thresholds(bordered("llama").config, LENGTH) == []
    for name in ("phi3 longrope", "llama dynamic", "llama yarn", "gemma3 window", "llama4 chunks"):
        assert BORDER in length_thresholds(bordered(name).config, LENGTH), name
        assert length_thresholds(bordered(name).config, BORDER) == []
    config = bordered("gemma3 longrope in half the layers").config
    config.rope_parameters["full_attention"]["original_max_position_embeddings"] = 23
    assert length_thresholds(config, LENGTH) == [BORDER, 23]
