"""A student of some layers computes what its teacher computes without the others."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import LayersConfig
from coldstill.stages.models.loading import load_model
from coldstill.stages.students.pruning.layers import TeacherWeights, cut_to_layers, layer_count
from coldstill.stages.training.execution import named_blocks
from conftest import FAMILIES, VOCABULARY, make_model
from small_pruning import logits
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

WHERE = "students.small.layers"
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention",
         "full_attention"]  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 5},
    "gemma2": {"num_hidden_layers": 5, "layer_types": KINDS, "eos_token_id": [0, 1, 2, 3, 4]},
    "gemma3_text": {"num_hidden_layers": 5, "layer_types": KINDS},
    "qwen2": {"num_hidden_layers": 5},
}
every_family = pytest.mark.parametrize("name", [*FAMILIES, "qwen2"])


def deep(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> Any:
    """A model of five layers, of both kinds in no pattern if the family mixes kinds."""
    settings = {**FAMILIES.get(name, {}), **CHANGES.get(name, {"num_hidden_layers": 5}), **changes}
    monkeypatch.setitem(FAMILIES, name, settings)
    return make_model(name, VOCABULARY + 16)


def by_hand(model: Any, keep: list[int]) -> torch.Tensor:
    """Logits of the same weights with every removed layer replaced by the identity."""

    class Identity(torch.nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            for name in ("attention_type", "layer_type"):
                if hasattr(layer, name):
                    setattr(self, name, getattr(layer, name))

        def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states

    found = named_blocks(model)
    assert found is not None
    blocks = found[1]
    own = list(blocks)
    for number, layer in enumerate(own):
        if number not in keep:
            blocks[number] = Identity(layer)
    try:
        return logits(model)
    finally:
        for number, layer in enumerate(own):
            blocks[number] = layer


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("keep", [[0, 2, 4], [1, 3], [0, 1, 2, 3, 4]], ids=str)
def test_some_layers_equal_the_teacher_without_the_others(
    name: str, keep: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    teacher = deep(monkeypatch, name)
    before = logits(teacher)
    student = cut_to_layers(teacher, keep, WHERE)
    assert torch.equal(logits(student), by_hand(teacher, keep))
    assert torch.equal(logits(teacher), before)
    if len(keep) == 5:
        assert torch.equal(logits(student), before)
        assert student.config.to_dict() == teacher.config.to_dict()
        return
    assert float((logits(student) - before).abs().max()) > 0.1
    assert student.config.num_hidden_layers == len(keep)
    if name.startswith("gemma"):
        assert student.config.layer_types == [KINDS[layer] for layer in keep]
    # a list with five entries that is not per layer
    assert student.config.eos_token_id == teacher.config.eos_token_id
    assert student.generation_config.to_dict() == teacher.generation_config.to_dict()

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(teacher)
    assert torch.equal(logits(again), logits(student))
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == teacher.config.tie_word_embeddings
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written.get("num_hidden_layers", written.get("n_layer")) == len(keep)


def test_half_precision_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep(monkeypatch, "llama-tied").to(torch.bfloat16).save_pretrained(tmp_path)
    teacher = load_model(str(tmp_path), "test", precision="auto")
    student = cut_to_layers(teacher, [0, 4], WHERE)
    assert student.dtype == torch.bfloat16
    assert torch.equal(logits(student), by_hand(teacher, [0, 4]))


def test_a_model_whose_layers_are_not_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = deep(monkeypatch, "llama")
    teacher.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))
    with pytest.raises(ColdstillError) as error:
        cut_to_layers(teacher, [0, 1], WHERE)
    assert str(error.value) == (
        "students.small.layers: cannot remove layers from a 'llama' model: its layers are not "
        "found; start from 'model' or 'architecture'"
    )


def test_layers_that_depend_on_their_position_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = deep(monkeypatch, "gpt2", scale_attn_by_inverse_layer_idx=True)
    assert torch.equal(
        logits(cut_to_layers(teacher, [0, 1, 2], WHERE)), by_hand(teacher, [0, 1, 2])
    )
    with pytest.raises(ColdstillError, match=r"'gpt2' model: its layers depend on their position"):
        cut_to_layers(teacher, [0, 2, 4], WHERE)


def test_layers_are_chosen_as_the_recipe_names_them() -> None:
    cases: list[tuple[dict[str, Any], int, list[int]]] = [
        ({"every": 1}, 3, [0, 1, 2]),
        ({"every": 2}, 5, [0, 2, 4]),
        ({"every": 3}, 8, [0, 3, 6]),
        ({"every": 5}, 5, [0]),
        ({"keep": 2}, 12, [0, 11]),
        ({"keep": 4}, 10, [0, 3, 6, 9]),
        ({"keep": 4}, 12, [0, 4, 7, 11]),
        ({"keep": 6}, 7, [0, 1, 2, 4, 5, 6]),
        ({"only": (0, 2, 5)}, 6, [0, 2, 5]),
    ]
    for keys, count, chosen in cases:
        assert LayersConfig(**keys).chosen(count, WHERE) == chosen
    for keys, reason in (
        ({"every": 6}, "asks for one layer in 6"),
        ({"keep": 6}, "asks for 6 layers"),
        ({"only": (0, 5)}, "asks for layer 5"),
    ):
        with pytest.raises(ColdstillError) as error:
            LayersConfig(**keys).chosen(5, WHERE)
        assert str(error.value) == f"{WHERE}: {reason}, the teacher has 5 layers (0 to 4)"


def test_evenly_spaced_layers_keep_both_ends_and_gaps_differ_by_at_most_one() -> None:
    for count in range(2, 40):
        for keep in range(2, count + 1):
            chosen = LayersConfig(keep=keep).chosen(count, WHERE)
            assert (len(chosen), chosen[0], chosen[-1]) == (keep, 0, count - 1)
            gaps = {after - before for before, after in itertools.pairwise(chosen)}
            assert max(gaps) - min(gaps) <= 1
            assert min(gaps) >= 1


def test_layers_are_counted_without_loading_weights(
    teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.nn.Module.__init__", None)
    assert layer_count(TeacherWeights(name=str(teacher_folder)), WHERE) == 2
    monkeypatch.undo()
    model = load_model(str(teacher_folder), "test", precision="fp32")
    found = named_blocks(model)
    assert found is not None
    assert found == ("model.layers", model.model.layers)
