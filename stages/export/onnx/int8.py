"""Quantises an ONNX file to int8 weights, with onnxruntime's dynamic quantisation.

Matrix products become integer products. Weights have one scale for each column, and activations are
quantised at run time. Weights are unsigned, because signed ones may saturate on processors without
VNNI, which a check on this machine would not show.

The embedding is quantised here with one scale for each row; onnxruntime would use a single scale.
If it is tied to the output head, the file holds only the head's matrix, and the embedding reads it
transposed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .program import LARGEST_FILE, only_errors

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEAD = "head_weight"


def quantise(whole: Path, path: Path) -> None:
    """Write the int8 form of an fp32 graph."""
    import onnx

    model = onnx.load(whole)
    embedding = _embedding(model.graph)
    tied = _untie(model.graph, embedding)
    model = _with_integer_products(model)
    _quantise_embedding(model.graph, embedding, tied)
    _save(model, path)


def _embedding(graph: Any) -> str:
    tokens = {"input_ids"}
    for node in graph.node:
        if node.op_type == "Reshape" and node.input[0] in tokens:
            tokens.add(node.output[0])  # GPT-2 reshapes the ids
        if node.op_type == "Gather" and node.input[1] in tokens:
            return str(node.input[0])
    raise AssertionError("the graph has no lookup of token ids")


def _untie(graph: Any, embedding: str) -> bool:
    """Give a tied head a matrix of its own, and return whether it was tied.

    onnxruntime quantises only products with a constant, and a tied head is a transposed embedding.
    """
    from onnx import numpy_helper

    turned = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] == embedding]
    if not turned:
        return False
    weight_VD = numpy_helper.to_array(_initializer(graph, embedding))
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight_VD.T), name=_HEAD))
    for node in turned:
        for user in graph.node:
            for place, name in enumerate(user.input):
                if name == node.output[0]:
                    user.input[place] = _HEAD
        graph.node.remove(node)
    return True


def _with_integer_products(model: Any) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # the logger recommends a preprocessing that changes nothing here
    with only_errors(), tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "whole.onnx", Path(folder) / "small.onnx"
        _save(model, whole)
        quantize_dynamic(
            whole,
            small,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=model.ByteSize() > LARGEST_FILE,
        )
        return onnx.load(small)


def _quantise_embedding(graph: Any, embedding: str, tied: bool) -> None:
    from onnx import helper, numpy_helper

    if tied:
        quantised = _initializer(graph, f"{_HEAD}_quantized")
        rows_VD = np.ascontiguousarray(numpy_helper.to_array(quantised).T)
        scale_V, zero_V = (
            numpy_helper.to_array(_initializer(graph, f"{_HEAD}_{part}")).reshape(-1)
            for part in ("scale", "zero_point")
        )
        graph.initializer.remove(quantised)
        turn = helper.make_node("Transpose", ["embedding_rows"], [quantised.name], perm=[1, 0])
        graph.node.insert(0, turn)
    else:
        rows_VD, scale_V, zero_V = by_rows(numpy_helper.to_array(_initializer(graph, embedding)))
    for name, array in (("rows", rows_VD), ("scale", scale_V), ("zero", zero_V)):
        graph.initializer.append(numpy_helper.from_array(array, name=f"embedding_{name}"))
    place, old = next(
        (place, node)
        for place, node in enumerate(graph.node)
        if node.op_type == "Gather" and node.input[0] == embedding
    )
    ids, result = old.input[1], old.output[0]
    graph.node.remove(old)
    for node in reversed(_looked_up(ids, result)):
        graph.node.insert(place, node)
    if not any(embedding in node.input for node in graph.node):
        graph.initializer.remove(_initializer(graph, embedding))


def _looked_up(ids: str, result: str) -> list[Any]:
    """Nodes that compute `(rows[ids] - zero[ids]) * scale[ids]` in fp32."""
    from onnx import TensorProto, helper

    make = helper.make_node
    last = helper.make_tensor("embedding_last_axis", TensorProto.INT64, [1], [-1])
    return [
        make("Constant", [], ["embedding_axis"], value=last),
        *(
            make("Gather", [f"embedding_{name}", ids], [f"token_{name}"])
            for name in ("rows", "scale", "zero")
        ),
        make("Cast", ["token_rows"], ["token_level"], to=TensorProto.FLOAT),
        make("Cast", ["token_zero"], ["token_shift"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["token_shift", "embedding_axis"], ["token_shift_1"]),
        make("Unsqueeze", ["token_scale", "embedding_axis"], ["token_scale_1"]),
        make("Sub", ["token_level", "token_shift_1"], ["token_shifted"]),
        make("Mul", ["token_shifted", "token_scale_1"], [result]),
    ]


def by_rows(
    weight_VD: NDArray[Any],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Quantise each row: [V, D] levels, [V] scales and [V] zero points.

    `(level - zero) * scale` differs from the weight by at most one scale. Zeros stay zeros.
    """
    low_V = np.minimum(weight_VD.min(1), 0.0)
    high_V = np.maximum(weight_VD.max(1), 0.0)
    scale_V = ((high_V - low_V) / 255.0).astype(np.float32)
    scale_V[scale_V == 0.0] = 1.0
    zero_V = np.clip(np.rint(-low_V / scale_V), 0, 255).astype(np.uint8)
    levels_VD = np.rint(weight_VD / scale_V[:, None]) + zero_V[:, None]
    return np.clip(levels_VD, 0, 255).astype(np.uint8), scale_V, zero_V


def _initializer(graph: Any, name: str) -> Any:
    return next(each for each in graph.initializer if each.name == name)


def _save(model: Any, path: Path) -> None:
    import onnx

    if model.ByteSize() <= LARGEST_FILE:
        onnx.save_model(model, path)
        return
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024
    )
