"""Exports that PyTorch loads, and the model card of every export."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from coldstill.data.schema import Capture
from coldstill.stages.evaluation.speed import GenerationSpeed
from coldstill.stages.export import FORMATS
from coldstill.stages.export.checks import Fidelity
from coldstill.stages.export.model_card import Facts, model_card
from coldstill.stages.export.record import Check, Costs, ExportRecord, StudentIdentity
from coldstill.stages.export.reference import TorchRuntime
from conftest import make_model
from exports import (
    TOKENS,
    difference,
    divergence,
    logprobs,
    small_student,
    stepped_logprobs,
    student_logprobs,
    written,
)
from oracles import LENGTH, manifest_for, random_block
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path

HF = FORMATS["hf"]


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "gemma3_text"])
def test_transformers_loads_the_same_student(family: str, tokenizer: Any, tmp_path: Path) -> None:
    student = small_student(family, tokenizer, tmp_path / "model")
    folder = written(HF, student, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in student.model.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    assert difference(student_logprobs(student), logprobs(HF.open(student, folder))) == 0.0
    text = "the teacher speaks once"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids


def test_a_family_whose_usual_tokenizer_splits_otherwise_gets_a_note(
    tokenizer: Any, tmp_path: Path
) -> None:
    for family, noted in (("qwen2", True), ("llama", False)):
        student = small_student(family, tokenizer, tmp_path / family)
        (tmp_path / f"{family}-hf").mkdir()
        notes = HF.write(student, tmp_path / f"{family}-hf")
        assert bool(notes) == noted
        assert all("load the tokenizer with PreTrainedTokenizerFast" in note for note in notes)


def test_generation_stops_at_the_end_of_text(tokenizer: Any, tmp_path: Path) -> None:
    student = small_student("llama", tokenizer, tmp_path / "model")
    for settings in (student.model.generation_config, student.model.config):
        settings.eos_token_id = None
    student.model.save_pretrained(student.folder)
    model = AutoModelForCausalLM.from_pretrained(written(HF, student, tmp_path / "hf"))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id is not None
    with torch.no_grad():
        model.lm_head.weight.zero_()
    # all logits are equal, so the first token is generated: the end of text
    assert tokenizer.eos_token_id == 0
    out = model.generate(torch.from_numpy(TOKENS[:5])[None], max_new_tokens=20, do_sample=False)
    assert out.shape[1] == 6


CAPTURE = Capture(head=8, tail=50, temperatures=(2.0,))
MANIFEST = replace(manifest_for(random_block(0, 2, CAPTURE)), sequences=4321)
HELDOUT = replace(MANIFEST, corpus=replace(MANIFEST.corpus, fingerprint="e" * 64))
FACTS = Facts(
    version="1.2.3",
    manifest=MANIFEST,
    heldout=HELDOUT,
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
CHECK = Check(
    format="gguf-f16",
    checked_by="llama.cpp 1",
    checked_by_own_runtime=True,
    check=Fidelity(
        documents=1,
        positions=4321,
        largest_difference=0.0123,
        kl=6.7e-8,
        information=1.0,
        agreement=0.9876,
        cached_difference=0.0,
    ),
    limits=HF.limits,
)
RECORD = ExportRecord(
    format="gguf-q8_0",
    checked_by=CHECK.checked_by,
    checked_by_own_runtime=True,
    check=replace(CHECK.check, kl=4.5e-6),
    limits=CHECK.limits,
    base=CHECK,
    notes=("its context is 24 tokens",),
    version=2,
    student=StudentIdentity(name="small", family="llama", parameters=1, fingerprint="f"),
    packages={},
    heldout="h",
    sample={},
    files={},
    costs=Costs(
        bytes=12_345_678,
        dtype="q8_0",
        machine="a machine",
        runtime="llama.cpp 1",
        generation=(
            GenerationSpeed(
                batch=1,
                prompt_tokens=8,
                new_tokens=8,
                first_token_seconds=1.0,
                prefill_tokens_per_second=2345.6,
                token_seconds=0.00123,
                token_seconds_p95=0.002,
                decode_tokens_per_second=1.0,
                memory_bytes=1,
            ),
        ),
    ),
)


TEACHER = "| teacher | ORG/teacher (`llama`, 1,000 parameters, float32), SHA-256 `" + "1" * 64


def card_of(facts: Facts, to: str = "hf", **changes: Any) -> str:
    return model_card("small", MODEL, FORMATS[to], facts, replace(RECORD, **changes))


def test_the_model_card_states_the_records_of_the_run() -> None:
    card = card_of(FACTS)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["coldstill", "distillation"],
    }
    for fact in (
        "\n# small\n",
        f"| model | `llama`, {MODEL.num_parameters():,} parameters |\n",
        TEACHER,
        "| corpus | 9 documents, SHA-256 `" + "3" * 64,
        f"4,321 of up to {LENGTH} tokens; documents packed together, separated by position ids",
        "head 8, tail 50 per position, also exact at the temperatures 2.0; codec plain, seed 0",
        "| objective | kl = 1.0, temperature = 2.0 |\n",
        "| training | steps = 500, learning_rate = 0.003 |\n",
        "| initial weights | random: family = llama, layers = 2 |\n",
        "| seed | 7 |\n",
        "| made with | coldstill 1.2.3 |\n\n## What was measured\n\nOn 16,000 ",
        "| held-out loss, nats | 5.0395 | 4.9422 |\n",
        "| same most probable token as the teacher | 62.4% | 100.0% |\n\n## These files\n\n|",
    ):
        assert fact in card, fact
    # without the store, the held-out store names teacher and corpus
    card = card_of(replace(FACTS, manifest=None))
    assert TEACHER in card
    assert "| corpus | held-out documents with the SHA-256 `" + "e" * 64 in card
    assert "| capture | no longer here |" in card
    assert "9 documents" not in card
    card = card_of(replace(FACTS, evaluation=None, teacher=None))
    assert "## What was measured\n\nNothing yet.\n\n## These files\n" in card


def test_the_model_card_states_how_its_files_were_checked_and_what_they_cost() -> None:
    card = card_of(FACTS, "gguf-q8_0")
    for fact in (
        "library_name: gguf\n",
        "| format | gguf-q8_0 |\n",
        "| size | 12.3 MB |\n",
        "| checked against the student | by llama.cpp 1 on 4,321 held-out positions: largest "
        "difference of two log-probabilities 0.012, KL 4.5e-06 nats, same most probable token "
        "98.76% |\n",
        "| before it was quantised (gguf-f16) | by llama.cpp 1 on 4,321 held-out positions: ",
        "KL 6.7e-08 nats",
        "| note | its context is 24 tokens |\n",
        "prompts 2,346 tokens/s, then 1.23 ms a token (a machine) |\n\n## Loading it\n\n```bash\n",
        "llama-cli -m small-q8_0.gguf",
    ):
        assert fact in card, fact
    bare = card_of(FACTS, base=None, notes=(), costs=replace(RECORD.costs, generation=()))
    for fact in ("before it was quantised", "| note |", "| speed"):
        assert fact not in bare, fact


def test_hostile_text_is_escaped_in_the_model_card() -> None:
    name = "x | y {{ name }} {% for %}\n---\n# <script>alert(1)</script>"
    teacher = replace(MANIFEST.teacher, name=name)
    card = card_of(replace(FACTS, manifest=None, heldout=replace(HELDOUT, teacher=teacher)))
    expected = (
        "| x \\| y {{ name }} {% for %} --- # &lt;script&gt;alert(1)&lt;/script&gt; (`llama`, "
    )
    assert expected in card
    assert card.startswith("---\nlibrary_name: transformers\n")


@pytest.mark.parametrize(
    ("student", "expected"),
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
def test_the_model_card_names_the_initial_weights(student: Any, expected: str) -> None:
    card = card_of(replace(FACTS, settings={"seed": 1, "student": student}))
    assert f"| initial weights | {expected} |" in card


def test_the_code_in_the_model_card_runs(
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = small_student("llama", tokenizer, tmp_path / "model")
    monkeypatch.chdir(written(HF, student, tmp_path / "hf"))
    code = card_of(FACTS).split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})
    text = capsys.readouterr().out
    assert text.startswith("Once")
    assert len(text) > len("Once\n")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_the_last_position_alone_has_the_same_logits(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = small_student(family, tokenizer, tmp_path / "model")
    runtime = TorchRuntime(student.model, "torch")
    whole, _ = runtime.step(TOKENS)
    part, cache = runtime.step(TOKENS[:-1], last=True)
    end, _ = runtime.step(TOKENS[-1:], cache, last=True)
    assert len(part) == len(end) == 1
    np.testing.assert_allclose(part[-1], whole[-2], atol=1e-4)
    np.testing.assert_allclose(end[-1], whole[-1], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt_neox"])
def test_torchao_int8_is_close_to_the_student_in_a_quarter_of_the_bytes(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    student = small_student(family, tokenizer, tmp_path / "model")
    folder = written(FORMATS["torchao-int8"], student, tmp_path / "int8")
    runtime = FORMATS["torchao-int8"].open(student, folder)
    assert 0 < divergence(student_logprobs(student), logprobs(runtime)) < 1e-3
    assert difference(logprobs(runtime), stepped_logprobs(runtime)) < 1e-4
    linear = [m for m in student.model.modules() if isinstance(m, torch.nn.Linear)]
    tied = student.model.config.tie_word_embeddings
    saved = sum(m.weight.numel() for m in linear if not (tied and m.weight.shape[0] > 300))
    before, after = (next(f.glob("*.safetensors")).stat().st_size for f in (student.folder, folder))
    # three of four bytes, less the scales and their names
    assert before - after > 0.5 * 3 * saved


def test_torchao_refuses_a_family_without_linear_layers(tokenizer: Any, tmp_path: Path) -> None:
    reason = FORMATS["torchao-int8"].refusal(small_student("gpt2", tokenizer, tmp_path / "model"))
    assert reason is not None
    assert "a 'gpt2' model has no linear layers" in reason
