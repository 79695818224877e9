"""Students as GGUF files, run by llama.cpp and by the reader of transformers."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.stages.export import FORMATS
from coldstill.stages.export.gguf import format as gguf_format
from coldstill.stages.export.gguf.architectures import ARCHITECTURES, refusal
from coldstill.stages.export.gguf.runtimes import read_back
from coldstill.stages.export.gguf.writer import SPLITS, tokens_refusal
from coldstill.stages.models.vocabulary import without_padding
from conftest import VOCABULARY
from exports import (
    TEXTS,
    TOKENS,
    difference,
    divergence,
    logprobs,
    small_student,
    stepped_logprobs,
    student_logprobs,
    written,
)

if TYPE_CHECKING:
    from pathlib import Path

gguf = pytest.importorskip("gguf")

F16, Q8 = FORMATS["gguf-f16"], FORMATS["gguf-q8_0"]
EVERY = ("llama-tied", *ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("family", gguf_format.READER_FAMILIES)
def test_the_reader_gives_the_student_s_logits(
    family: str, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = small_student(family, tokenizer, tmp_path / "model")
    folder = written(F16, student, tmp_path / "f16")
    tokens = TOKENS[: F16.context(student)]
    ours = student_logprobs(student, tokens)
    runtime = read_back(folder / "small-f16.gguf", student)
    assert difference(ours, logprobs(runtime, tokens)) < 0.02
    assert not runtime.is_own
    assert capsys.readouterr().err == ""
    folder = written(Q8, student, tmp_path / "q8_0")
    theirs = logprobs(read_back(folder / "small-q8_0.gguf", student), tokens)
    assert 1e-9 < divergence(ours, theirs) < 1e-3


@pytest.mark.llama_cpp
@pytest.mark.parametrize("family", EVERY)
def test_llama_cpp_gives_the_student_s_logits(family: str, tokenizer: Any, tmp_path: Path) -> None:
    student = small_student(family, tokenizer, tmp_path / "model")
    tokens = TOKENS[: F16.context(student)]
    ours = student_logprobs(student, tokens)
    for form, most in ((F16, 1e-5), (Q8, 1e-3), (FORMATS["gguf-q4_0"], 3e-2)):
        folder = written(form, student, tmp_path / str(most))
        runtime = form.open(student, folder)
        assert runtime.is_own
        theirs = logprobs(runtime, tokens)
        assert divergence(ours, theirs) < most
        assert difference(theirs, stepped_logprobs(runtime, tokens)) < 0.1
        runtime.close()


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_last_position_alone(tokenizer: Any, tmp_path: Path) -> None:
    student = small_student("llama", tokenizer, tmp_path / "model")
    runtime: Any = F16.open(student, written(F16, student, tmp_path / "f16"))
    whole, _ = runtime.step(TOKENS)
    part, cache = runtime.step(TOKENS[:-1], last=True)
    end, _ = runtime.step(TOKENS[-1:], cache, last=True)
    again, _ = runtime.step(TOKENS)
    runtime.close()
    assert part.shape == end.shape == (1, whole.shape[1])
    np.testing.assert_allclose(part[0], whole[-2], atol=0.05)
    np.testing.assert_allclose(end[0], whole[-1], atol=0.05)
    np.testing.assert_array_equal(again, whole)


@pytest.mark.llama_cpp
def test_other_tokens_and_an_aborted_llama_cpp_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    student = small_student("llama", tokenizer, tmp_path / "model")
    runtime: Any = F16.open(student, written(F16, student, tmp_path / "f16"))

    class Other:
        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoded", (), {"input_ids": [1, 2, 3]})

        def decode(self, ids: list[int]) -> str:
            return "xyz"

    with pytest.raises(ColdstillError, match=r"splits text into other tokens .* near 'xyz'"):
        runtime.expect_tokens(Other(), TEXTS[0])
    runtime.child.send_signal(signal.SIGKILL)
    with pytest.raises(ColdstillError, match=r"small-f16\.gguf: llama\.cpp was ended by SIGKILL"):
        logprobs(runtime)
    runtime.close()


@pytest.mark.llama_cpp
def test_a_library_that_does_not_fit_is_one_line(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = small_student("llama", tokenizer, tmp_path / "model")
    folder = written(F16, student, tmp_path / "f16")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(ColdstillError, match=r"llama\.cpp: Shared library .* not found$"):
        F16.open(student, folder)
    other = find_spec("numpy._core._multiarray_umath")
    assert other is not None
    assert other.origin is not None
    (tmp_path / "libllama.so").symlink_to(other.origin)
    with pytest.raises(ColdstillError, match=r"does not fit its library: .* symbol"):
        F16.open(student, folder)


def tensors(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("*.gguf")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_queries_and_keys_of_llama_are_interleaved(tokenizer: Any, tmp_path: Path) -> None:
    student = small_student("llama", tokenizer, tmp_path / "model")
    found = tensors(written(F16, student, tmp_path / "f16"))
    layer, head = student.model.model.layers[0].self_attn, 8
    for name, matrix in (("attn_q", layer.q_proj), ("attn_k", layer.k_proj)):
        part = found[f"blk.0.{name}.weight"]
        theirs = gguf.dequantize(part.data, part.tensor_type)
        ours = matrix.weight.detach().numpy()
        for row in range(len(ours)):
            inside = row % head
            place = row - inside + (2 * inside if inside < 4 else 2 * (inside - 4) + 1)
            np.testing.assert_array_equal(theirs[place], ours[row].astype(np.float16))


def test_padding_and_a_tied_head_are_not_written(tokenizer: Any, tmp_path: Path) -> None:
    student = small_student("llama-tied", tokenizer, tmp_path / "model")
    found = tensors(written(Q8, student, tmp_path / "q8"))
    assert "output.weight" not in found
    assert found["token_embd.weight"].shape.tolist() == [32, VOCABULARY]
    assert found["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert found["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_window_shortens_the_context(tokenizer: Any, tmp_path: Path) -> None:
    student = small_student("mistral", tokenizer, tmp_path / "model")
    folder = written(F16, student, tmp_path / "f16")
    reader = gguf.GGUFReader(folder / "small-f16.gguf")
    assert reader.fields["llama.context_length"].contents() == 24


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("llama", {"hidden_act": "relu"}, "'llama' model with the activation 'relu'"),
        ("gemma2", {"tie_word_embeddings": False}, "'gemma2' model with an untied output head"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'gpt2' model that scales attention"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "'qwen3' model with rotary embeddings of type 'yarn'",
        ),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotates only a part"),
        ("llama", {"model_type": "bloom"}, "a 'bloom' model is not of a known family"),
    ],
)
def test_models_that_llama_cpp_cannot_compute_are_refused(
    family: str, settings: dict[str, Any], expected: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = small_student(family, tokenizer, tmp_path / "model")
    for name, value in settings.items():
        setattr(student.model.config, name, value)
    reason = refusal(student.model)
    assert reason is not None
    assert expected in reason
    assert F16.refusal(student) == reason


def test_families_that_only_llama_cpp_can_check_need_it(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_format, "has_llama_cpp", lambda: False)
    for family in ARCHITECTURES:
        named = "llama" if family == "llama" else family
        student = small_student(named, tokenizer, tmp_path / family)
        reason = F16.refusal(student)
        if family in gguf_format.READER_FAMILIES:
            assert reason is None
        else:
            assert reason is not None
            assert reason.endswith("pip install 'coldstill[llama]'")


class Described:
    """A tokenizer that has only a description."""

    def __init__(self, **parts: Any) -> None:
        self.parts = {"model": {"type": "BPE"}, "normalizer": None, **parts}
        self.backend_tokenizer = self

    def to_str(self) -> str:
        return json.dumps(self.parts)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (Described(model={"type": "Unigram"}, pre_tokenizer=None), "of the kind 'Unigram'"),
        (Described(pre_tokenizer={**BYTES}), "a rule that is not among the known"),
        (Described(pre_tokenizer={**BYTES, "use_regex": True, "add_prefix_space": True}), "a rule"),
        (Described(pre_tokenizer={**BYTES, "use_regex": True}), None),
        *(
            (
                Described(
                    pre_tokenizer={
                        "type": "Sequence",
                        "pretokenizers": [{"type": "Split", "pattern": {"Regex": rule}}, BYTES],
                    }
                ),
                None,
            )
            for rule in SPLITS
        ),
        (Described(pre_tokenizer=None), None),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_support_are_refused(
    tokenizer: Described, expected: str | None
) -> None:
    reason = tokens_refusal(tokenizer)
    assert (reason is None) == (expected is None)
    if expected is not None:
        assert expected in str(reason)


def rotated(tokenizer: Any, folder: Path) -> Any:
    """A student whose rotary frequencies are scaled as in Llama 3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    student = small_student("llama", tokenizer, folder)
    config = AutoConfig.from_pretrained(student.folder)
    config.rope_parameters = scaled
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return replace(student, model=without_padding(model, VOCABULARY))


@pytest.mark.llama_cpp
def test_llama_cpp_scales_rotary_frequencies(tokenizer: Any, tmp_path: Path) -> None:
    student = rotated(tokenizer, tmp_path / "model")
    runtime = F16.open(student, written(F16, student, tmp_path / "f16"))
    assert divergence(student_logprobs(student), logprobs(runtime)) < 1e-5
    runtime.close()


def test_scaled_rotary_frequencies_are_written(tokenizer: Any, tmp_path: Path) -> None:
    student = rotated(tokenizer, tmp_path / "model")
    folder = written(F16, student, tmp_path / "f16")
    factors = tensors(folder)["rope_freqs.weight"].data
    plain = 10000.0 ** -(np.arange(4) / 4)
    np.testing.assert_allclose(
        plain / factors, student.model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5
    )
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)
