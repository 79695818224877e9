"""Students as ONNX graphs, run by onnxruntime with and without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.export import FORMATS
from coldstill.stages.export.onnx import int8 as onnx_int8
from coldstill.stages.export.onnx import program as onnx_program
from coldstill.stages.export.onnx.int8 import by_blocks, quantise
from coldstill.stages.export.onnx.program import OnnxRuntime
from conftest import VOCABULARY, make_model
from exports import (
    PADDED,
    TOKENS,
    difference,
    divergence,
    logprobs,
    small_student,
    stepped_logprobs,
    student_logprobs,
)

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.export.contract import LoadedStudent

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FORM, INT8 = FORMATS["onnx"], FORMATS["onnx-int8"]


@pytest.fixture(scope="module", params=["llama-tied", "gpt2", "mistral"])
def exported(
    request: pytest.FixtureRequest, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedStudent, Path]:
    """A student and its fp32 graph: a tied head with rotary embeddings, GPT-2, a window."""
    folder = tmp_path_factory.mktemp("onnx")
    student = small_student(request.param, tokenizer, folder / "model")
    (folder / "onnx").mkdir()
    FORM.write(student, folder / "onnx")
    return student, folder / "onnx"


def test_onnxruntime_gives_the_student_s_logits_with_and_without_a_cache(
    exported: tuple[LoadedStudent, Path],
) -> None:
    student, folder = exported
    runtime = FORM.open(student, folder)
    assert difference(student_logprobs(student), logprobs(runtime)) < 1e-5
    assert difference(logprobs(runtime), stepped_logprobs(runtime)) < 1e-5
    assert difference(logprobs(runtime), stepped_logprobs(runtime, first=1)) < 1e-5


def test_batches_are_padded_on_the_left_with_mask_and_positions(
    exported: tuple[LoadedStudent, Path],
) -> None:
    student, folder = exported
    runtime = OnnxRuntime.load(folder / "model.onnx")
    short, length = 9, 14
    ids = np.stack([TOKENS[:length], np.r_[np.zeros(length - short, np.int64), TOKENS[:short]]])
    mask = np.ones((2, length), np.int64)
    mask[1, : length - short] = 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = torch.from_numpy(runtime.session.run(["logits"], inputs | runtime.empty_cache(2))[0])
    expected = student_logprobs(student)
    whole, padded = logits.double().log_softmax(-1)
    assert difference(expected[:length], whole) < 1e-5
    assert difference(expected[:short], padded[length - short :]) < 1e-5


def test_the_graph_has_the_usual_names(exported: tuple[LoadedStudent, Path]) -> None:
    graph = onnx.load(exported[1] / "model.onnx").graph
    past = [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]
    expected = ["input_ids", "attention_mask", "position_ids", *past]
    assert [each.name for each in graph.input] == expected
    present = [name.replace("past_key_values", "present") for name in past]
    assert [each.name for each in graph.output] == ["logits", *present]
    assert not any(node.metadata_props or node.doc_string for node in graph.node)


def test_int8_is_close_to_the_student_and_stores_a_tied_matrix_once(
    exported: tuple[LoadedStudent, Path], tmp_path: Path
) -> None:
    student, folder = exported
    whole, path = folder / "model.onnx", tmp_path / "model.onnx"
    width = student.model.config.hidden_size
    copies = 1 if student.model.config.tie_word_embeddings else 2
    quantise(whole, path)
    for file in (whole, path):
        weights = [each for each in onnx.load(file).graph.initializer if VOCABULARY in each.dims]
        assert sum(np.prod(each.dims) >= VOCABULARY * width for each in weights) == copies
    parameters = student.model.num_parameters()
    levels = [each for each in onnx.load(path).graph.initializer if each.data_type == 2]
    assert sum(np.prod(each.dims) for each in levels) > 0.9 * parameters - 128 * width
    runtime = INT8.open(student, tmp_path)
    ours = student_logprobs(student)
    assert 0 < divergence(ours, logprobs(runtime)) < 1e-3
    assert difference(ours, logprobs(runtime)) < 0.5
    assert difference(logprobs(runtime), stepped_logprobs(runtime)) < 0.5


def test_large_weights_are_in_a_second_file(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (onnx_program, onnx_int8):
        monkeypatch.setattr(module, "LARGEST_FILE", 1000)
    student = small_student("llama", tokenizer, tmp_path / "model")
    folder = tmp_path / "onnx"
    folder.mkdir()
    FORM.write(student, folder)
    # all but the norms, which are small
    assert (folder / "model.onnx.data").stat().st_size > 0.9 * 4 * student.model.num_parameters()
    ours = student_logprobs(student)
    assert difference(ours, logprobs(FORM.open(student, folder))) < 1e-5
    small = tmp_path / "int8"
    small.mkdir()
    quantise(folder / "model.onnx", small / "model.onnx")
    assert (small / "model.onnx.data").stat().st_size < 2 * student.model.num_parameters()
    assert divergence(ours, logprobs(INT8.open(student, small))) < 1e-3


@pytest.mark.parametrize(("width", "shape"), [(64, (2, 32)), (40, (2, 32)), (7, (1, 32))])
def test_quantised_blocks_keep_zero_and_differ_by_at_most_half_a_step(
    width: int, shape: tuple[int, int]
) -> None:
    random = np.random.default_rng(0)
    weight = (random.normal(size=(20, width)) * random.uniform(0, 3, (20, 1))).astype(np.float32)
    weight[3] = 0.0
    weight[4, :32] = 1e3  # does not spoil the blocks behind it
    levels, scale = by_blocks(weight)
    assert levels.shape == (20, *shape)
    assert scale.shape == levels.shape[:2]
    padded_NBS = np.zeros((20, shape[0] * shape[1]), np.float32)
    padded_NBS[:, :width] = weight
    padded_NBS = padded_NBS.reshape(levels.shape)
    back_NBS = (levels.astype(np.float64) - 128) * scale[:, :, None]
    assert np.all(np.abs(back_NBS - padded_NBS) <= 0.501 * scale[:, :, None])
    assert np.all(back_NBS[3] == 0.0)


def test_one_large_state_does_not_spoil_those_of_other_tokens(tmp_path: Path) -> None:
    """In many language models the first token has states hundreds of times larger than others."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    table, weight = random.normal(size=(8, 64)), random.normal(size=(64, 10))
    table[0] *= 1000.0
    weights = {"table": table.astype(np.float32), "weight": weight.astype(np.float32)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("MatMul", ["states", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two nodes",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 10])],
        [numpy_helper.from_array(array, name=name) for name, array in weights.items()],
    )
    whole, path = tmp_path / "whole.onnx", tmp_path / "int8.onnx"
    onnx.save_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), whole
    )
    quantise(whole, path)
    session = onnxruntime.InferenceSession(str(path))
    (found,) = session.run(["logits"], {"input_ids": np.array([[0, 5, 3]])})
    expected = table[[0, 5, 3]] @ weight
    for row in range(3):
        error = np.abs(found[0, row] - expected[row]).max() / np.abs(expected[row]).max()
        assert error < 0.02


def test_a_model_without_a_plain_cache_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "mamba", vocab_size=PADDED, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    student = small_student("llama", tokenizer, tmp_path / "model")
    reason = FORM.refusal(replace(student, model=AutoModelForCausalLM.from_config(config).eval()))
    assert reason is not None
    assert "'mamba'" in reason


def test_a_file_that_is_not_a_graph_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(
        ColdstillError, match=r"model\.onnx: onnxruntime cannot load it: "
    ) as caught:
        OnnxRuntime.load(path)
    assert "\n" not in str(caught.value)


def test_the_shape_of_a_cache_has_grouped_heads() -> None:
    model = make_model("qwen3", VOCABULARY)
    assert onnx_program.cache_shapes(model) == [(2, 16, 16)] * 2
