"""Students as ONNX graphs: what onnxruntime says, with its cache and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.export import FORMATS
from coldstill.stages.export.onnx import int8 as onnx_int8
from coldstill.stages.export.onnx import program as onnx_program
from coldstill.stages.export.onnx.int8 import by_rows, quantise
from coldstill.stages.export.onnx.runtime import OnnxRuntime
from conftest import VOCABULARY, make_model
from exports import (
    PADDED,
    TOKENS,
    difference,
    divergence,
    logprobs,
    source_of,
    stepped_logprobs,
    student_logprobs,
)

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.export.contract import Source

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FORM, INT8 = FORMATS["onnx"], FORMATS["onnx-int8"]


@pytest.fixture(scope="module", params=["llama-tied", "gpt2", "mistral"])
def exported(
    request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Source, Path]:
    """A student and its fp32 graph: a tied head with rotary embeddings, GPT-2, and a window."""
    folder = tmp_path_factory.mktemp("onnx")
    source = source_of(request.param, tokenizer, folder / "model")
    (folder / "onnx").mkdir()
    FORM.write(source, folder / "onnx")
    return source, folder / "onnx"


def test_onnxruntime_says_what_the_student_says(exported: tuple[Source, Path]) -> None:
    source, folder = exported
    assert difference(student_logprobs(source), logprobs(FORM.open(source, folder))) < 1e-5


def test_cached_decoding_equals_no_cache(exported: tuple[Source, Path]) -> None:
    source, folder = exported
    runtime = FORM.open(source, folder)
    assert difference(logprobs(runtime), stepped_logprobs(runtime)) < 1e-5
    assert difference(logprobs(runtime), stepped_logprobs(runtime, first=1)) < 1e-5


def test_rows_of_a_batch_are_padded_on_the_left_by_mask_and_positions(
    exported: tuple[Source, Path],
) -> None:
    source, folder = exported
    session = OnnxRuntime.load(folder / "model.onnx").session
    short, length = 9, 14
    ids = np.stack([TOKENS[:length], np.r_[np.zeros(length - short, np.int64), TOKENS[:short]]])
    mask = np.ones((2, length), np.int64)
    mask[1, : length - short] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    nothing = {
        each.name: np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = torch.from_numpy(session.run(["logits"], inputs | nothing)[0])
    expected = student_logprobs(source)
    whole, padded = logits.double().log_softmax(-1)
    assert difference(expected[:length], whole) < 1e-5
    assert difference(expected[:short], padded[length - short :]) < 1e-5


def test_the_graph_has_the_names_that_are_usual(exported: tuple[Source, Path]) -> None:
    graph = onnx.load(exported[1] / "model.onnx").graph
    past = [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    expected = ["input_ids", "attention_mask", "position_ids", *past]
    assert [each.name for each in graph.input] == expected
    present = [name.replace("past_key_values", "present") for name in past]
    assert [each.name for each in graph.output] == ["logits", *present]
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def is_tied(source: Source) -> bool:
    return bool(source.model.config.tie_word_embeddings)


def stored(path: Path) -> list[tuple[int, ...]]:
    """The shapes of what the file holds."""
    return [tuple(each.dims) for each in onnx.load(path).graph.initializer]


def test_a_tied_matrix_is_stored_once_in_fp32_and_in_int8(
    exported: tuple[Source, Path], tmp_path: Path
) -> None:
    source, folder = exported
    whole, path = folder / "model.onnx", tmp_path / "model.onnx"
    width, copies = source.model.config.hidden_size, 1 if is_tied(source) else 2
    quantise(whole, path)
    for file in (whole, path):
        shapes = stored(file)
        found = shapes.count((VOCABULARY, width)) + shapes.count((width, VOCABULARY))
        assert found == copies
    parameters = source.model.num_parameters()
    levels = [each for each in onnx.load(path).graph.initializer if each.data_type == 2]
    assert sum(np.prod(each.dims) for each in levels) > 0.9 * parameters - 128 * width


def test_int8_is_near_the_student_and_nearer_with_its_own_rows(
    exported: tuple[Source, Path], tmp_path: Path
) -> None:
    source, folder = exported
    quantise(folder / "model.onnx", tmp_path / "model.onnx")
    runtime = INT8.open(source, tmp_path)
    ours = student_logprobs(source)
    assert 0 < divergence(ours, logprobs(runtime)) < 1e-3
    assert difference(ours, logprobs(runtime)) < 0.5
    assert difference(logprobs(runtime), stepped_logprobs(runtime)) < 0.5


def test_large_weights_lie_in_a_file_beside(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (onnx_program, onnx_int8):
        monkeypatch.setattr(module, "LARGEST_FILE", 1000)
    source = source_of("llama", tokenizer, tmp_path / "model")
    folder = tmp_path / "onnx"
    folder.mkdir()
    FORM.write(source, folder)
    # all but the norms, which are too small for it
    assert (folder / "model.onnx.data").stat().st_size > 0.9 * 4 * source.model.num_parameters()
    ours = student_logprobs(source)
    assert difference(ours, logprobs(FORM.open(source, folder))) < 1e-5
    small = tmp_path / "int8"
    small.mkdir()
    quantise(folder / "model.onnx", small / "model.onnx")
    assert (small / "model.onnx.data").stat().st_size < 2 * source.model.num_parameters()
    assert divergence(ours, logprobs(INT8.open(source, small))) < 1e-3


def test_rows_keep_their_zero_and_are_off_by_a_step_at_most() -> None:
    random = np.random.default_rng(0)
    weight = (random.normal(size=(20, 16)) * random.uniform(0, 3, (20, 1))).astype(np.float32)
    weight[3] = 0.0
    weight[4] = np.abs(weight[4])
    levels, scale, zero = by_rows(weight)
    back = (levels.astype(np.float64) - zero[:, None]) * scale[:, None]
    assert np.all(np.abs(back - weight) <= scale[:, None] * 1.001)
    assert np.all(back[3] == 0.0)


def test_a_model_without_a_plain_cache_is_refused_with_its_family(
    tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=PADDED, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    source = source_of("llama", tokenizer, tmp_path / "model")
    object.__setattr__(source, "model", AutoModelForCausalLM.from_config(config).eval())
    reason = FORM.refusal(source)
    assert reason is not None
    assert "'mamba'" in reason


def test_what_is_no_graph_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ColdstillError, match=r"model\.onnx: onnxruntime cannot load it: ") as told:
        OnnxRuntime.load(path)
    assert "\n" not in str(told.value)


def test_families_have_shapes_of_their_own() -> None:
    model = make_model("qwen3", VOCABULARY)
    assert onnx_program.cache_shapes(model) == [(2, 16, 16)] * 2
