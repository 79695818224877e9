"""Models and tokenizers: loading, making, naming, and refusing in one line."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.config import ArchitectureConfig
from coldstill.stages.models.building import build_model, unused_heads
from coldstill.stages.models.built_sizes import feed_forward_widths, layer_count_of
from coldstill.stages.models.generation import repair_generation
from coldstill.stages.models.identity import teacher_identity
from coldstill.stages.models.loading import context_length, load_model, load_tokenizer
from coldstill.stages.models.vocabulary import (
    expect_same_tokens,
    tokenizer_identity,
    vocabulary_size,
)
from conftest import FAMILIES, VOCABULARY, make_model
from tokenizers import AddedToken, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.store.manifest import TeacherIdentity


def identity(folder: Path, dtype: str = "fp32") -> TeacherIdentity:
    return teacher_identity(str(folder), "teacher.model", dtype=dtype, revision="main")


def refused(call: Callable[[], Any]) -> str:
    """The one line with which something is refused."""
    with pytest.raises(ColdstillError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_comes_back_from_disk_as_it_was(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_model(family, VOCABULARY + 16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded = load_model(str(tmp_path / "model"), "teacher.model", precision="fp32")
    assert not loaded.training
    assert loaded.dtype == torch.float32
    tokens = torch.arange(10)[None] * 7
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)
    again = load_tokenizer(str(tmp_path / "model"), "teacher.model")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert context_length(loaded.config) == 128
    found = identity(tmp_path / "model")
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.family == model.config.model_type


def test_precision_decides_the_dtype(teacher_folder: Path, tmp_path: Path) -> None:
    name = str(teacher_folder)
    assert load_model(name, "m", precision="bf16").dtype == torch.bfloat16
    assert load_model(name, "m", precision="auto").dtype == torch.float32
    load_model(name, "m", precision="bf16").save_pretrained(tmp_path / "half")
    assert load_model(str(tmp_path / "half"), "m", precision="auto").dtype == torch.bfloat16
    assert load_model(str(tmp_path / "half"), "m", precision="fp32").dtype == torch.float32
    assert identity(tmp_path / "half", "auto").dtype == "bfloat16"
    eager = load_model(name, "m", precision="fp32", attention="eager")
    assert eager.config._attn_implementation == "eager"


def test_a_teacher_is_known_by_its_weights_and_settings_and_not_by_its_name(
    teacher_folder: Path, tmp_path: Path
) -> None:
    own = identity(teacher_folder)
    assert (own.name, own.dtype, own.family) == ("model", "float32", "llama")
    shutil.copytree(teacher_folder, tmp_path / "renamed")
    renamed = identity(tmp_path / "renamed")
    assert renamed.name == "renamed"
    assert renamed.fingerprint == own.fingerprint
    assert identity(teacher_folder, "bf16").dtype == "bfloat16"
    assert identity(teacher_folder, "auto").dtype == "float32"

    model = load_model(str(teacher_folder), "m", precision="fp32")
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    model.save_pretrained(tmp_path / "touched")
    assert identity(tmp_path / "touched").fingerprint != own.fingerprint

    model = load_model(str(teacher_folder), "m", precision="fp32")
    model.config.rms_norm_eps = 1e-3  # the same weights, another function
    model.save_pretrained(tmp_path / "set")
    assert identity(tmp_path / "set").fingerprint != own.fingerprint


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_tied_parameters_are_counted_once(shards: str, tmp_path: Path) -> None:
    counts = {}
    for name in ("llama", "llama-tied"):
        model = make_model(name, VOCABULARY)
        model.save_pretrained(tmp_path / name, max_shard_size=shards)
        found = identity(tmp_path / name)
        assert found.parameters == model.num_parameters()
        files = list((tmp_path / name).glob("*.safetensors"))
        assert (len(files) > 1) == (shards == "20KB")
        assert found.bytes == sum(file.stat().st_size for file in files)
        counts[name] = found.parameters
    assert counts["llama"] - counts["llama-tied"] == VOCABULARY * 32


def test_weights_in_the_older_format_are_read_too(tmp_path: Path) -> None:
    model = make_model("llama", VOCABULARY)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert identity(tmp_path).parameters == model.num_parameters()


def test_the_vocabulary_is_what_the_tokenizer_says(tokenizer: Any) -> None:
    assert vocabulary_size(tokenizer) == VOCABULARY
    assert tokenizer_identity(tokenizer).size == VOCABULARY


def retokenized(tokenizer_folder: Path, change: Callable[[Tokenizer], None], folder: Path) -> Any:
    """The tokenizer with something changed."""
    shutil.copytree(tokenizer_folder, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(backend)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(str(folder), "student")


def test_a_student_with_other_tokens_is_refused_by_the_first_that_differs(
    tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    expect_same_tokens(tokenizer, load_tokenizer(str(tokenizer_folder), "s"), "students.a")

    def add(backend: Tokenizer) -> None:
        backend.add_tokens([AddedToken("<extra>", special=True)])

    longer = retokenized(tokenizer_folder, add, tmp_path / "longer")
    told = refused(lambda: expect_same_tokens(tokenizer, longer, "students.a"))
    assert told == (
        "students.a: its tokenizer is not the teacher's: id 320 is '<extra>', the teacher's is "
        "None; a student must share the teacher's tokens"
    )
    text = (tokenizer_folder / "tokenizer.json").read_text()
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    shutil.copytree(tokenizer_folder, tmp_path / "swapped")
    a, b = (f'"{vocabulary[i]}": {i}' for i in (70, 90))
    swapped = text.replace(a, f'"{vocabulary[70]}": 90').replace(b, f'"{vocabulary[90]}": 70')
    assert swapped != text
    (tmp_path / "swapped" / "tokenizer.json").write_text(swapped)
    other = load_tokenizer(str(tmp_path / "swapped"), "s")
    told = refused(lambda: expect_same_tokens(tokenizer, other, "students.a"))
    assert f"id 70 is {vocabulary[90]!r}, the teacher's is {vocabulary[70]!r}" in told


def test_padding_of_the_embedding_does_not_make_other_tokens(
    tokenizer: Any, teacher_folder: Path, tmp_path: Path
) -> None:
    """The teacher's rows are padded past the tokenizer, the student's otherwise: same tokens."""
    make_model("llama", VOCABULARY + 64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = load_tokenizer(str(teacher_folder), "t")
    expect_same_tokens(teacher, load_tokenizer(str(tmp_path), "s"), "students.a")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_new_model_is_as_large_as_it_was_asked_for(
    family: str, tied: bool, tokenizer: Any
) -> None:
    sizes = ArchitectureConfig(
        family=family, layers=2, hidden=48, heads=3, feed_forward=80, tied=tied
    )
    model = build_model(sizes, tokenizer, 32, 0, "students.a.architecture")
    same = build_model(sizes, tokenizer, 32, 0, "students.a.architecture")
    other = build_model(sizes, tokenizer, 32, 1, "students.a.architecture")
    config = model.config
    assert model.get_output_embeddings().weight.shape == (VOCABULARY, 48)
    assert context_length(config) == 4 * 32
    assert (config.num_hidden_layers, config.num_attention_heads) == (2, 3)
    weights = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (weights[0].data_ptr() == weights[1].data_ptr()) == tied
    first, again, different = (next(m.parameters()) for m in (model, same, other))
    assert torch.equal(first, again)
    assert not torch.equal(first, different)
    assert any(80 in p.shape for p in model.parameters())  # the feed-forward width arrived
    assert not model.training


def test_a_context_can_be_asked_for(tokenizer: Any) -> None:
    sizes = ArchitectureConfig(family="gpt2", layers=1, hidden=32, heads=2, context=77)
    assert context_length(build_model(sizes, tokenizer, 32, 0, "a").config) == 77


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"hidden": 33, "heads": 2}, "a.b: hidden = 33 is not a multiple of heads = 2"),
        ({"heads": 4, "kv_heads": 3}, "a.b: heads = 4 is not a multiple of kv_heads = 3"),
        ({"family": "lama"}, "a.b: cannot make a 'lama' model: "),
        ({"family": "bert-of-mars"}, "a.b: cannot make a 'bert-of-mars' model: "),
        ({"family": "t5"}, "a.b: cannot make a 't5' model: "),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(
    sizes: dict[str, Any], told: str, tokenizer: Any
) -> None:
    settings: dict[str, Any] = {"layers": 1, "hidden": 32, "heads": 2}
    config = ArchitectureConfig(**(settings | sizes))
    assert refused(lambda: build_model(config, tokenizer, 32, 0, "a.b")).startswith(told)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing")
    assert refused(lambda: load_tokenizer(missing, "a.b")) == f"a.b: no folder {missing}"
    told = refused(lambda: load_model(missing, "a.b", precision="fp32"))
    assert told == f"a.b: no folder {missing}"
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert refused(lambda: load_tokenizer(empty, "a.b")).startswith(f"a.b: no tokenizer in {empty}")
    told = refused(lambda: load_model(empty, "a.b", precision="fp32"))
    assert told.startswith(f"a.b: cannot load {empty}: ")
    assert refused(lambda: identity(tmp_path / "empty")).startswith("teacher.model: cannot load")
    make_model("llama", VOCABULARY).config.save_pretrained(tmp_path / "bare")
    told = refused(lambda: identity(tmp_path / "bare"))
    assert told.endswith("bare holds no *.safetensors or *.bin weights")


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (
            {"family": "mpt", "feed_forward": 96},
            "feed_forward = 96: a 'mpt' model has feed_fo",
        ),
        (
            {"family": "bloom", "feed_forward": 96},
            "feed_forward = 96: a 'bloom' model has feed_",
        ),
        (
            {"family": "bloom", "context": 77},
            "context = 77: a 'bloom' model has no such si",
        ),
        (
            {"family": "mamba", "feed_forward": 96},
            "feed_forward = 96: a 'mamba' model has no su",
        ),
        ({"family": "gpt2", "kv_heads": 1}, "kv_heads = 1: a 'gpt2' model has kv_heads = "),
        ({"family": "bailing_hybrid"}, "tied = true: a 'bailing_hybrid' model has tw"),
        (
            {"family": "gemma3"},
            "cannot make a 'gemma3' model: it is made of ",
        ),
    ],
)
def test_a_size_that_a_family_does_not_take_is_refused_with_those_that_it_does(
    sizes: dict[str, Any], told: str, tokenizer: Any
) -> None:
    config = ArchitectureConfig(**({"layers": 2, "hidden": 64, "heads": 4} | sizes))
    line = refused(lambda: build_model(config, tokenizer, 32, 0, "a.b"))
    assert line.startswith(f"a.b: {told}"), line
    assert "choose " in line


@pytest.mark.parametrize(
    "family", ["opt", "gptj", "codegen", "xglm", "lfm2", "qwen3_moe", "falcon", "gpt_neo", "gpt2"]
)
def test_every_size_of_a_family_with_names_of_its_own_arrives(family: str, tokenizer: Any) -> None:
    sizes = ArchitectureConfig(
        family=family, layers=3, hidden=64, heads=4, feed_forward=96, context=80
    )
    model = build_model(sizes, tokenizer, 32, 0, "a.b")
    assert feed_forward_widths(model) & {96, 192}
    assert not {width for width in feed_forward_widths(model) if width > 192}
    assert layer_count_of(model, 3) == 3
    assert model.get_input_embeddings().weight.shape == (VOCABULARY, 64)
    assert context_length(model.config) == 80
    tokens = torch.arange(6)[None]
    assert model(input_ids=tokens, use_cache=False).logits.isfinite().all()


def test_a_family_without_attention_heads_says_so() -> None:
    rwkv = ArchitectureConfig(family="rwkv", layers=1, hidden=32, heads=2)
    assert unused_heads(rwkv, "a") == (
        "a: heads = 2 decides nothing: a 'rwkv' model has no attention heads"
    )
    assert unused_heads(ArchitectureConfig(layers=1, hidden=32, heads=2), "a") is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_sample": False, "temperature": 0.7}, "left out: temperature = 0.7"),
        ({"do_sample": False, "top_p": 0.9, "top_k": 20}, "left out: top_p = 0.9, top_k = 20"),
        ({"num_beams": 1, "length_penalty": 2.0}, "left out: length_penalty = 2.0"),
        ({"pad_token_id": -1}, "left out: pad_token_id = -1"),
    ],
)
def test_generation_settings_that_cannot_be_saved_are_mended_and_told(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    make_model("llama", VOCABULARY).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
    model = load_model(str(tmp_path / "model"), "m", precision="fp32")
    note = repair_generation(model)
    assert note is not None
    assert note.endswith(told)
    model.generation_config.eos_token_id = 3  # changed, so transformers checks strictly
    model.save_pretrained(tmp_path / "again")
    assert repair_generation(load_model(str(tmp_path / "again"), "m", precision="fp32")) is None
