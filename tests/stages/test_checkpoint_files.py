"""The weight files of a model are those that transformers loads; each counts once."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import refused, save_checkpoint
from coldstill.stages.models.loading import load_config, load_model, teacher_identity
from coldstill.stages.planning.model_sizes import sizes_of_model
from conftest import VOCABULARY, make_model
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.data.store.manifest import TeacherIdentity


def identity(folder: Path) -> TeacherIdentity:
    return teacher_identity(str(folder), "m", dtype="auto", revision="main")


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_repeated_files_and_tied_tensors_count_once(
    shards: str, family: str, tmp_path: Path
) -> None:
    model = make_model(family, VOCABULARY)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    own, files = identity(tmp_path), list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "20KB")
    assert own.parameters == model.num_parameters()
    assert own.bytes == sum(path.stat().st_size for path in files)
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "zz.safetensors"):
        shutil.copy(files[0], tmp_path / name)
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin"):
        torch.save({"steps": [1, 2]}, tmp_path / name)
    assert identity(tmp_path) == own
    sizes = sizes_of_model(tmp_path)
    assert sizes is not None
    assert sizes.parameters == model.num_parameters()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_pickled_weights_are_read_in_both_formats(old: bool, family: str, tmp_path: Path) -> None:
    model = make_model(family, VOCABULARY)
    model.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=not old)
    torch.save({"steps": [1, 2]}, tmp_path / "training_args.bin")
    found = identity(tmp_path)
    assert found.parameters == model.num_parameters()
    assert found.bytes == path.stat().st_size
    loaded = load_model(str(tmp_path), "m", precision="fp32").state_dict()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


class _Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    make_model("llama", VOCABULARY).config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": _Runs(f"touch {tmp_path}/ran")}, path)
    refused(lambda: load_model(str(tmp_path), "m", precision="fp32"))
    assert "could run code" in refused(lambda: identity(tmp_path))
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"a": torch.ones(2)}}, path)
    assert refused(lambda: identity(tmp_path)).startswith(f"m: {path}: is not a table of tensors")


def test_a_pointer_of_git_lfs_and_half_a_file_are_named(tokenizer: Any, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, tokenizer) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    line = refused(lambda: identity(tmp_path))
    assert line.startswith(f"m: safetensors cannot read model.safetensors of {tmp_path} (damaged")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    line = refused(lambda: load_model(str(tmp_path), "m", precision="fp32"))
    assert line.startswith(f"m: {path} is a pointer of Git LFS, not the weights;")


def test_weights_under_a_name_that_is_never_loaded_are_refused(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = save_checkpoint(tmp_path, tokenizer) / "model.safetensors"
    path.rename(tmp_path / "consolidated.safetensors")
    line = refused(lambda: identity(tmp_path))
    assert "that transformers loads" in line
    assert "but consolidated.safetensors" in line


def test_an_adapter_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    settings = json.dumps({"base_model_name_or_path": "org/base", "peft_type": "LORA"})
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(settings)
    save_file({"a": torch.zeros(1)}, alone / "adapter_model.safetensors")
    for call in (lambda: identity(alone), lambda: load_config(str(alone), "m")):
        assert refused(call).startswith(f"m: {alone} holds an adapter of 'org/base' and no model;")
    beside = save_checkpoint(tmp_path / "beside", tokenizer)
    (beside / "adapter_config.json").write_text(settings)
    line = refused(lambda: load_model(str(beside), "m", precision="fp32"))
    assert "beside complete weights" in line
