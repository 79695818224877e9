"""Students of few bits: rounding as the runtimes do it, training with it, and lossless exports."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import ArchitectureConfig, LayersConfig, QuantizeConfig
from coldstill.stages.export import FORMATS
from coldstill.stages.export.contract import LoadedStudent
from coldstill.stages.export.export_student import grid_notes
from coldstill.stages.models.grids import Q4, Q8, RECORD, ROW, SCHEMES, Grid, grid_record
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.students.lesson import lesson
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.train_student import train_student
from coldstill.stages.training.batch import collate
from coldstill.stages.training.feed import StoreDataset
from coldstill.stages.training.objective import attach_objective, terms_of
from conftest import VOCABULARY, make_model
from exports import LENGTH as CONTEXT
from exports import TEXTS, logprobs, student_logprobs, written
from pydantic import TypeAdapter
from small_students import (
    KilledError,
    expect_same_training,
    killed_at,
    refusal,
    saved,
    student_job,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.students.few_bits import Rounding
    from coldstill.stages.students.job import StudentJob

pytest.importorskip("torchao")
gguf = pytest.importorskip("gguf")

SMALL = ArchitectureConfig(layers=1, hidden=32, heads=2, feed_forward=64)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantize_config(scheme: str, start: float = 0.0) -> QuantizeConfig:
    """The table of a recipe."""
    return TypeAdapter(QuantizeConfig).validate_python({"scheme": scheme, "start": start})


def rounding_of(model: Any, scheme: str, start: float = 0.0, steps: int = 4) -> Rounding:
    from coldstill.stages.students.few_bits import round_layers

    return round_layers(model, quantize_config(scheme, start), steps, "students.s")


def switch(rounding: Rounding, step: int = 0) -> None:
    """Tell the callback that a step begins."""
    rounding.on_step_begin(None, type("State", (), {"global_step": step}), None)


# grids


def matrices() -> Iterator[torch.Tensor]:
    """Matrices with blocks of zeros, tiny and large values, and ties of opposite sign."""
    for seed in range(3):
        weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(seed))
        weight[0, :32] = 0.0
        weight[1] *= 1e-7
        weight[2] *= 1e4
        weight[3, 40], weight[3, 50] = 7.0, -7.0
        weight[4, 40], weight[4, 50] = -7.0, 7.0
        yield weight


@pytest.mark.parametrize("grid", [Q4, Q8], ids=lambda grid: grid.name)
def test_rounding_is_that_of_ggml_to_the_last_bit(grid: Grid) -> None:
    kind = gguf.GGMLQuantizationType[grid.name.upper()]

    def theirs(weight: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))

    for weight in matrices():
        rounded = grid.rounded(weight)
        assert torch.equal(rounded, theirs(weight))
        assert not torch.equal(rounded, weight)
        # a fixed point of both
        assert torch.equal(theirs(rounded), rounded)
        assert torch.equal(grid.rounded(rounded), rounded)


def test_a_row_has_255_levels_up_to_its_largest_weight() -> None:
    for weight in matrices():
        exact = weight.double().numpy()
        scale = np.abs(exact).max(1, keepdims=True) / 127
        rounded = ROW.rounded(weight).numpy()
        np.testing.assert_allclose(rounded, np.rint(exact / scale) * scale, rtol=1e-6)
        np.testing.assert_allclose(np.abs(rounded).max(1), np.abs(exact).max(1), rtol=1e-6)
        np.testing.assert_allclose(ROW.rounded(torch.from_numpy(rounded)), rounded, rtol=1e-6)


# training


def plain_on_grid(model: Any, scheme: str) -> Any:
    """A copy with rounded weights in its plain layers, and rounded inputs if the scheme has them:
    the reference, without torchao."""
    other, own = copy.deepcopy(model), SCHEMES[scheme]
    tied = other.config.tie_word_embeddings
    with torch.no_grad():
        for name, weight in other.named_parameters():
            of_head = "lm_head" in name or (tied and "embed_tokens" in name)
            if weight.ndim == 2 and not (of_head and tied and not own.tied_head):
                weight.copy_((own.head if of_head else own.layers).rounded(weight))
    return other


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scheme", ["int4", "int8", "int8-row"])
def test_loss_and_gradient_are_those_at_the_rounded_weights(
    scheme: str, tied: bool, store: StoreReader
) -> None:
    model = make_model("llama-tied" if tied else "llama", VOCABULARY + 16)
    batch = collate([StoreDataset(store)[row] for row in range(3)], isolation="positions")
    reference = plain_on_grid(model, scheme)
    terms = terms_of(student_job(store.place.root).objective, store.manifest.capture, "test")  # type: ignore[attr-defined]  # a local store

    def measured(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
        attach_objective(connect_head(model, VOCABULARY), terms)
        loss = model(batch)["loss"]
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        model.zero_grad()
        del model.forward
        return float(loss.detach()), gradients

    expected, gradients = measured(reference)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rounding = rounding_of(model, scheme)
    assert not rounding.first
    switch(rounding)
    loss, ours = measured(model)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)
    # what is saved in checkpoints is exact, under the names of the plain model
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], weight) for name, weight in before.items())
    switch(rounding, -1)
    exact, _ = measured(model)
    assert abs(exact - expected) > 1e-5 * abs(expected)


@pytest.mark.parametrize("whole", [False, True], ids=["chunks", "full logits"])
def test_inputs_are_rounded_too_also_of_the_head(whole: bool) -> None:
    model = make_model("llama", VOCABULARY)
    reference = plain_on_grid(model, "int8-dynamic")
    for module in reference.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given: (Q8.rounded(given[0]),))
    switch(rounding_of(model, "int8-dynamic"))
    head = connect_head(model, VOCABULARY)
    assert not head.whole
    if whole:
        head = type(head)(model, VOCABULARY, whole=True)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        hidden = head.hidden({"input_ids": tokens})[0]
        ours = head.logits(hidden, head.buffer(24, hidden.device))
        theirs = reference(tokens).logits[0]
        half = plain_on_grid(model_of(model), "int8")(tokens).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert float((theirs - half).abs().max()) > 1e-3


def model_of(model: Any) -> Any:
    """A plain model with the weights of one that rounds."""
    plain = make_model("llama", VOCABULARY)
    plain.load_state_dict(model.state_dict())
    return plain


def few_bits(folder: Path, scheme: str = "int4", start: float = 0.0, **changes: Any) -> StudentJob:
    """Six steps of a student of few bits."""
    settings = {"architecture": SMALL, "quantize": quantize_config(scheme, start)}
    return student_job(folder, **(settings | changes))


def test_a_trained_student_is_a_plain_checkpoint_on_the_grid(
    store: StoreReader, tmp_path: Path
) -> None:
    notes: list[str] = []
    train_student(few_bits(tmp_path), store, lambda report: notes.append(report.note or ""))
    (note,) = (note for note in notes if note.startswith("int4"))
    assert (
        note == "int4: rounds matrices, 1 in 8 bits (q8_0) and 7 in 4 bits (q4_0), from step 1 on"
    )
    weights = saved(tmp_path)
    assert set(weights) == {name for name, _ in load(tmp_path).named_parameters()}
    record = grid_record(tmp_path / "model")
    assert record is not None
    assert record["scheme"] == "int4"
    assert record["formats"] == ["gguf-q4_0"]
    assert record["exact"]["tensors"] == []
    eight, four = record["grids"]
    assert (eight["name"], eight["bits"], eight["block"]) == ("q8_0", 8, 32)
    assert eight["tensors"] == ["model.embed_tokens.weight", "lm_head.weight"]
    assert eight["parameters"] == weights["model.embed_tokens.weight"].numel()
    assert sorted(name.split(".")[-2] for name in four["tensors"]) == sorted(LAYERS)
    norms = sum(weight.numel() for weight in weights.values() if weight.ndim == 1)
    assert record["exact"]["parameters"] == norms
    for name, weight in weights.items():
        if weight.ndim == 2:
            grid = Q8 if "embed" in name else Q4
            assert torch.equal(grid.rounded(weight), weight), name
            assert (name in four["tensors"]) is ("embed" not in name)


def load(folder: Path) -> Any:
    return load_model(str(folder / "model"), "test", precision="fp32")


def test_rounding_begins_after_its_share_of_the_steps(store: StoreReader, tmp_path: Path) -> None:
    rounding = rounding_of(make_model("llama", VOCABULARY), "int8", start=0.5, steps=5)
    assert rounding.first == 3
    layer = rounding._model.model.layers[0].mlp.up_proj
    for step in range(5):
        switch(rounding, step)
        assert layer.weight_fake_quantizer.enabled is (step >= 3)
    # the steps before are those of a training without rounding
    losses = []
    for name, changes in (("late", {"start": 0.5}), ("exact", {"quantize": None})):
        train_student(few_bits(tmp_path / name, **changes), store)
        text = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8")
        losses.append([json.loads(line)["loss"] for line in text.splitlines()])
    late, exact = losses
    assert late[:3] == exact[:3]
    assert late[3] != exact[3]
    assert grid_record(tmp_path / "exact" / "model") is None


@pytest.mark.parametrize("origin", ["new", "layers of the teacher"])
def test_an_interrupted_training_continues_bit_for_bit(
    origin: str, store: StoreReader, saved_teacher: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {}
    if origin != "new":
        changes = {
            "architecture": None,
            "layers": LayersConfig(only=(1,)),
            "teacher": saved_teacher,
        }
    whole, cut = (
        few_bits(tmp_path / name, start=0.5, train={"checkpoint_every": 2}, **changes)
        for name in "ab"
    )
    train_student(whole, store)
    with pytest.raises(KilledError):
        train_student(cut, store, killed_at(5))
    assert (tmp_path / "b" / "checkpoints" / "checkpoint-4").is_dir()
    train_student(cut, store)
    expect_same_training(tmp_path / "a", tmp_path / "b")
    records = [(tmp_path / name / "model" / RECORD).read_bytes() for name in "ab"]
    assert records[0] == records[1]


def test_only_the_last_round_of_pruning_rounds(tmp_path: Path) -> None:
    cuts = (PruneConfig(parameters=9000), PruneConfig(parameters=8000))
    job = few_bits(tmp_path, architecture=None, prune=cuts)
    first, last = job.rounds()
    assert first.quantize is None
    assert last.quantize == job.quantize


# refusals


@pytest.mark.parametrize(
    ("family", "scheme", "settings", "expected"),
    [
        (
            "llama",
            "int4",
            {"intermediate_size": 80},
            "students.s.quantize: int4 has one scale for every 32 inputs of a layer, and "
            "model.layers.0.mlp.down_proj has 80; choose sizes that are multiples of 32, or "
            "quantize = 'int8-row'",
        ),
        ("gpt2", "int8", {}, "a 'gpt2' model has no linear layers that torchao can train"),
        (
            "gemma3_text",
            "int8",
            {},
            "cannot train model.embed_tokens of a 'gemma3_text' model with rounding: it is a "
            "Gemma3TextScaledWordEmbedding, neither Linear nor Embedding; remove quantize, and",
        ),
    ],
)
def test_what_a_format_or_torchao_cannot_hold_is_refused(
    family: str, scheme: str, settings: dict[str, Any], expected: str
) -> None:
    model = make_model(family, VOCABULARY, **settings)
    before = [type(module) for module in model.modules()]
    with pytest.raises(ColdstillError) as error:
        rounding_of(model, scheme)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert [type(module) for module in model.modules()] == before


def test_a_width_is_refused_before_anything_is_written(store: StoreReader, tmp_path: Path) -> None:
    narrow = ArchitectureConfig(layers=1, hidden=32, heads=2, feed_forward=72)
    message = refusal(
        lambda: train_student(few_bits(tmp_path, architecture=narrow), store), tmp_path
    )
    assert "down_proj has 72; choose sizes that are multiples of 32" in message


@pytest.mark.parametrize(("scheme", "warned"), [("int4", True), ("int8", False)])
def test_a_family_without_an_export_of_its_grid_is_reported(
    scheme: str, warned: bool, store: StoreReader, tmp_path: Path
) -> None:
    """olmo has no GGUF, but int8 is for ONNX too."""
    other = ArchitectureConfig(family="olmo", layers=1, hidden=32, heads=2, feed_forward=64)
    warnings: list[str] = []
    job = few_bits(tmp_path, scheme, architecture=other, train={"steps": 1})
    train_student(job, store, lambda report: warnings.extend([report.note] * report.warning))
    expected = (
        "int4 is for gguf-q4_0, which cannot hold students of the family 'olmo': no export will "
        "have the rounded weights"
    )
    assert (expected in warnings) is warned


def test_a_missing_torchao_is_named_before_training(
    store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldstill.stages.students.lesson.find_spec", lambda name: None)
    job = few_bits(tmp_path)
    assert refusal(lambda: lesson(job, store), tmp_path) == (
        "students.small.quantize: needs the package 'torchao', which is not installed; pip install "
        "'coldstill[torchao]'"
    )
    lesson(few_bits(tmp_path, quantize=None), store)


# exports


def on_grid(
    family: str, scheme: str, tokenizer: Any, folder: Path, **settings: Any
) -> LoadedStudent:
    """A student whose weights lie on a grid."""
    model = make_model(family, VOCABULARY, num_attention_heads=4, **settings)
    record = rounding_of(model, scheme).finish()
    model.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")
    return LoadedStudent(
        name="small",
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        vocabulary=VOCABULARY,
        length=CONTEXT,
        texts=TEXTS,
    )


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gpt_neox"])
@pytest.mark.parametrize(("scheme", "to"), [("int4", "gguf-q4_0"), ("int8", "gguf-q8_0")])
def test_a_gguf_file_holds_the_rounded_weights_exactly(
    scheme: str, to: str, family: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = on_grid(family, scheme, tokenizer, tmp_path / "model")
    (path,) = written(FORMATS[to], student, tmp_path / "out").glob("*.gguf")
    ours = sorted(
        weight.detach().numpy().sum(1, dtype=np.float64).tolist()
        for weight in student.model.parameters()
        if weight.ndim == 2
    )
    theirs, kinds = [], {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            held = gguf.dequantize(tensor.data, tensor.tensor_type)
            # rows may be reordered, values not
            theirs.append(held.sum(1, dtype=np.float64).tolist())
            kinds[tensor.name] = tensor.tensor_type.name
    assert [sorted(rows) for rows in sorted(map(sorted, theirs))] == sorted(map(sorted, ours))
    eight = {name for name in kinds if name == "output.weight"} or {"token_embd.weight"}
    if scheme == "int4":
        assert {name for name, kind in kinds.items() if kind == "Q8_0"} == eight
        assert sum(kind == "Q4_0" for kind in kinds.values()) == len(kinds) - len(eight)
    else:
        assert set(kinds.values()) == {"Q8_0"}


def test_onnx_holds_the_rounded_weights_exactly(tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from coldstill.stages.export.onnx.int8 import by_blocks

    student = on_grid("llama", "int8", tokenizer, tmp_path / "model")
    for weight in student.model.parameters():
        if weight.ndim == 2:
            levels, scale = by_blocks(weight.detach().numpy())
            held = (levels.astype(np.float32) - 128) * scale[:, :, None]
            np.testing.assert_allclose(
                held.reshape(weight.shape), weight.detach().numpy(), rtol=1e-6, atol=0
            )


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_torchao_holds_the_rounded_weights_exactly(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = on_grid(family, "int8-row", tokenizer, tmp_path / "model")
    form = FORMATS["torchao-int8"]
    runtime = form.open(student, written(form, student, tmp_path / "out"))
    ours, theirs = dict(student.model.named_parameters()), dict(runtime.model.named_parameters())  # type: ignore[attr-defined]
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        other = theirs[name]
        other = other.dequantize() if hasattr(other, "qdata") else other
        torch.testing.assert_close(other, weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(logprobs(runtime), student_logprobs(student), rtol=1e-4, atol=1e-4)


def test_an_export_says_what_it_does_to_the_grid(tokenizer: Any, tmp_path: Path) -> None:
    on_grid("llama", "int8", tokenizer, tmp_path / "model")

    def says(to: str) -> list[str]:
        return grid_notes(to, FORMATS[to], tmp_path / "model")

    same = ["its weights were trained rounded as this format rounds them (int8)"]
    assert says("gguf-q8_0") == says("onnx-int8") == same
    begun = "its weights were trained rounded (int8) for gguf-q8_0 and onnx-int8; "
    assert says("gguf-q4_0") == [f"{begun}gguf-q4_0 rounds them again, to other values"]
    assert says("hf") == [f"{begun}hf holds them unrounded"]
    assert grid_notes("hf", FORMATS["hf"], tmp_path) == []
