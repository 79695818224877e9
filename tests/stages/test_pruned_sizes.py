"""A pruned student is counted from its teacher's files before anybody loads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.planning.model_sizes import sizes_of_model
from coldstill.stages.planning.pruned_sizes import anatomy_of_model, sizes_of_cuts
from coldstill.stages.students.pruning.config import PruneConfig
from coldstill.stages.students.pruning.shapes import target_sizes
from coldstill.stages.students.pruning.surgery import choose, cut
from safetensors.torch import load_file, save_file
from small_pruning import anatomy, every_model, pruning_model, random_importance

if TYPE_CHECKING:
    from pathlib import Path

WHERE = "students.small.prune"
TWICE = (PruneConfig(parameters="70%"), PruneConfig(parameters="45%", layers_by="loss"))


@every_model
def test_what_the_headers_say_is_what_comes_out(name: str, tmp_path: Path) -> None:
    model = pruning_model(name)
    built = anatomy(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    whole, read = sizes_of_model(str(tmp_path)), anatomy_of_model(str(tmp_path), "main", WHERE)
    assert whole is not None
    assert read is not None
    assert (read.sizes, read.head_width) == (built.sizes, built.head_width)
    first, last = sizes_of_cuts(whole, read, TWICE, WHERE)
    target = target_sizes(built, TWICE[0], model.num_parameters(), WHERE)
    small = cut(model, built, choose(built, target, random_importance(built.sizes)), WHERE)
    small.save_pretrained(tmp_path / "small")
    assert first == sizes_of_model(str(tmp_path / "small"))
    assert 0.3 * whole.parameters < last.parameters <= 0.45 * whole.parameters


def test_older_files_leave_out_the_first_word_and_hold_masks(tmp_path: Path) -> None:
    model = pruning_model("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {key.removeprefix("transformer."): w for key, w in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in weights
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 128, 128)}, path)
    assert anatomy_of_model(str(tmp_path), "main", WHERE) == anatomy(model)


def test_what_cannot_be_told_is_unknown_and_what_cannot_be_pruned_is_refused(
    tmp_path: Path,
) -> None:
    assert anatomy_of_model(str(tmp_path / "nowhere"), "main", WHERE) is None
    model = pruning_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    with pytest.raises(ColdstillError, match="cannot prune a 'bloom' model"):
        anatomy_of_model(str(tmp_path), "main", WHERE)
    (tmp_path / "config.json").write_text("[]")
    assert anatomy_of_model(str(tmp_path), "main", WHERE) is None
    (tmp_path / "model.safetensors").unlink()
    assert anatomy_of_model(str(tmp_path), "main", WHERE) is None
