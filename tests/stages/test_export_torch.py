"""Exports that PyTorch loads: the student as it is with its page, and int8 weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from coldstill.data.schema import Capture
from coldstill.data.store.manifest import (
    CorpusIdentity,
    Manifest,
    Packing,
    TeacherIdentity,
    TokenizerIdentity,
)
from coldstill.stages.export import FORMATS
from coldstill.stages.export.model_card import Facts, model_card
from coldstill.stages.export.torch_runtime import TorchRuntime
from conftest import make_model
from exports import (
    TOKENS,
    difference,
    divergence,
    logprobs,
    source_of,
    stepped_logprobs,
    student_logprobs,
    written,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path

HF = FORMATS["hf"]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma3_text"])
def test_what_transformers_loads_again_is_the_student(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    source = source_of(family, tokenizer, tmp_path / "model")
    folder = written(HF, source, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in source.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    ours = student_logprobs(source)
    assert difference(ours, logprobs(HF.open(source, folder))) == 0.0
    text = "the teacher speaks once"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_generation_knows_where_to_end(tokenizer: Any, tmp_path: Path) -> None:
    source = source_of("llama", tokenizer, tmp_path / "model")
    for settings in (source.model.generation_config, source.model.config):
        settings.eos_token_id = None
    source.model.save_pretrained(source.folder)
    folder = written(HF, source, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id is not None
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
    # all tokens alike: the first is the end of text
    assert tokenizer.eos_token_id == 0
    out = model.generate(torch.from_numpy(TOKENS[:5])[None], max_new_tokens=20, do_sample=False)
    assert out.shape[1] == 6


MANIFEST = Manifest(
    teacher=TeacherIdentity(
        name="ORG/TEACHER",
        fingerprint="a" * 64,
        family="llama",
        dtype="float32",
        parameters=12345678,
        bytes=9,
    ),
    tokenizer=TokenizerIdentity(fingerprint="b" * 64, size=320),
    corpus=CorpusIdentity(fingerprint="c" * 64, split="train", documents=1234),
    packing=Packing(
        sequence_length=256,
        together=True,
        isolation="positions",
        separator=(0,),
        fingerprint="d" * 64,
    ),
    capture=Capture(head=8, tail=50, temperatures=(2.0,)),
    sequences=4321,
    shard_sequences=64,
    block_sequences=64,
)
FACTS = Facts(
    version="1.2.3",
    manifest=MANIFEST,
    heldout=replace(
        MANIFEST, corpus=CorpusIdentity(fingerprint="e" * 64, split="heldout", documents=12)
    ),
    settings={
        "seed": 7,
        "student": {
            "architecture": {"family": "llama", "layers": 2, "kv_heads": None},
            "objective": {"kl": 1.0, "cross_entropy": 0.0, "temperature": 2.0},
            "train": {"steps": 500, "learning_rate": 0.003},
        },
    },
    evaluation={"loss": 5.0395, "kl": 0.277, "agreement": 0.624, "positions": 16000},
    teacher={"loss": 4.9422, "kl": 0.0, "agreement": 1.0},
)


MODEL = make_model("llama", 320)
CHECK = {"positions": 4321, "largest_difference": 0.0123, "kl": 4.5e-6, "agreement": 0.9876}
RECORD: dict[str, Any] = {
    "format": "gguf-q8_0",
    "checked_by": "llama.cpp 1",
    "check": CHECK,
    "base": {"format": "gguf-f16", "checked_by": "llama.cpp 1", "check": {**CHECK, "kl": 6.7e-8}},
    "notes": ["its context is 24 tokens"],
    "costs": {
        "bytes": 12_345_678,
        "machine": "a machine",
        "generation": [{"prefill_tokens_per_second": 2345.6, "token_seconds": 0.00123}],
    },
}


def page_of(facts: Facts, to: str = "hf", **changes: Any) -> str:
    return model_card("small", MODEL, FORMATS[to], facts, {**RECORD, **changes})


def test_the_page_says_what_the_run_has_written_down() -> None:
    page = page_of(FACTS)
    front = yaml.safe_load(page.split("---\n")[1])
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    for fact in (
        "# small\n",
        f"| model | `llama`, {MODEL.num_parameters():,} parameters |",
        "ORG/TEACHER (`llama`, 12,345,678 parameters, float32), SHA-256 `" + "a" * 64,
        "1,234 documents, SHA-256 `" + "c" * 64,
        "4,321 of up to 256 tokens; documents packed together, kept apart by position ids",
        "head 8, tail 50 a position, exact at the temperatures 2.0 too; codec plain, seed 0",
        "| objective | kl = 1.0, temperature = 2.0 |",
        "| training | steps = 500, learning_rate = 0.003 |",
        "| begun as | random weights: family = llama, layers = 2 |",
        "| seed | 7 |",
        "coldstill 1.2.3",
        "On 16,000 positions of held-out documents",
        "| held-out loss, nats | 5.0395 | 4.9422 |",
        "| same most probable token as the teacher | 62.4% | 100.0% |",
    ):
        assert fact in page, fact


def test_the_page_says_how_its_files_were_checked_and_what_they_cost() -> None:
    page = page_of(FACTS, "gguf-q8_0")
    for fact in (
        "library_name: gguf",
        "| format | gguf-q8_0 |",
        "| size | 12.3 MB |",
        "| checked against the student | by llama.cpp 1 on 4,321 held-out positions: largest "
        "difference of two log-probabilities 0.012, KL 4.5e-06 nats, same most probable token "
        "98.76% |",
        "| before it was quantised (gguf-f16) | by llama.cpp 1 on 4,321 held-out positions: ",
        "KL 6.7e-08 nats",
        "| note | its context is 24 tokens |",
        "prompts 2,346 tokens/s, then 1.23 ms a token (a machine)",
        "llama-cli -m small-q8_0.gguf",
    ):
        assert fact in page, fact
    bare = page_of(FACTS, base=None, notes=[], costs={**RECORD["costs"], "generation": []})
    for fact in ("before it was quantised", "| note |", "| speed"):
        assert fact not in bare, fact


def test_where_the_store_is_gone_the_held_out_one_tells_of_teacher_and_corpus() -> None:
    page = page_of(replace(FACTS, manifest=None))
    assert "ORG/TEACHER (`llama`, 12,345,678 parameters, float32), SHA-256 `" + "a" * 64 in page
    assert "| corpus | held-out documents with the SHA-256 `" + "e" * 64 in page
    assert "| capture | no longer here |" in page
    assert "1,234 documents" not in page


def test_the_page_says_nothing_that_is_not_known() -> None:
    assert "Nothing yet." in page_of(replace(FACTS, evaluation=None, teacher=None))


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (
            {"prune": {"parameters": "60%", "layers": None, "sequences": 1024}},
            "the teacher, pruned to at most 60% of its parameters",
        ),
        (
            {"prune": [{"parameters": "80%"}, {"layers": 4, "hidden": 1024, "parameters": 5000}]},
            "the teacher, pruned to at most 80% of its parameters, then to 4 layers and 1,024 "
            "hidden channels and at most 5,000 parameters",
        ),
        ({"model": "ORG/SMALL"}, "ORG/SMALL"),
        ({"layers": {"every": 2, "keep": None}}, "layers of the teacher: every = 2"),
    ],
)
def test_the_page_says_in_words_what_a_student_began_as(student: Any, said: str) -> None:
    page = page_of(replace(FACTS, settings={"seed": 1, "student": student}))
    assert f"| begun as | {said} |" in page


@pytest.mark.parametrize("to", ["hf", "onnx"])
def test_the_page_s_own_code_runs(
    to: str,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package in FORMATS[to].packages:
        pytest.importorskip(package)
    source = source_of("llama", tokenizer, tmp_path / "model")
    monkeypatch.chdir(written(FORMATS[to], source, tmp_path / to))
    code = page_of(FACTS, to).split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    text = capsys.readouterr().out
    assert text.startswith("Once")
    assert len(text) > len("Once\n")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_where_only_the_last_place_is_wanted_no_other_is_computed(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    source = source_of(family, tokenizer, tmp_path / "model")
    runtime = TorchRuntime(source.model, "torch")
    whole, _ = runtime.step(TOKENS)
    part, cache = runtime.step(TOKENS[:-1], last=True)
    end, _ = runtime.step(TOKENS[-1:], cache, last=True)
    assert len(part) == len(end) == 1
    np.testing.assert_allclose(part[-1], whole[-2], atol=1e-4)
    np.testing.assert_allclose(end[-1], whole[-1], atol=1e-4)


AO_FAMILIES = ["llama", "llama-tied", "gpt_neox"]


@pytest.mark.parametrize("family", AO_FAMILIES)
def test_int8_weights_say_nearly_the_same_in_a_quarter_of_the_bytes(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    source = source_of(family, tokenizer, tmp_path / "model")
    folder = written(FORMATS["torchao-int8"], source, tmp_path / "int8")
    runtime = FORMATS["torchao-int8"].open(source, folder)
    ours = student_logprobs(source)
    assert 0 < divergence(ours, logprobs(runtime)) < 1e-3
    assert difference(logprobs(runtime), stepped_logprobs(runtime)) < 1e-4
    linear = [m for m in source.model.modules() if isinstance(m, torch.nn.Linear)]
    tied = source.model.config.tie_word_embeddings
    saved = sum(m.weight.numel() for m in linear if not (tied and m.weight.shape[0] > 300))
    before, after = (next(f.glob("*.safetensors")).stat().st_size for f in (source.folder, folder))
    # three of four bytes, less a scale for each row and the names of both
    assert before - after > 0.5 * 3 * saved


def test_a_family_without_linear_layers_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    source = source_of("gpt2", tokenizer, tmp_path / "model")
    reason = FORMATS["torchao-int8"].refusal(source)
    assert reason is not None
    assert "a 'gpt2' model has no linear layers" in reason
