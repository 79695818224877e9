"""Whole exports and their comparison with the student: padding, windows, limits, later checks."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from coldstill.data.errors import ColdstillError
from coldstill.data.schema import Capture
from coldstill.stages.evaluate import evaluate_student
from coldstill.stages.export import FORMATS
from coldstill.stages.export.checks import Fidelity, compare
from coldstill.stages.export.contract import Limits, Runtime, chosen_formats
from coldstill.stages.export.export_student import ExportJob, export_student
from coldstill.stages.export.model_card import Facts
from coldstill.stages.export.reference import TorchRuntime, sampled_documents
from coldstill.stages.models.loading import load_model
from coldstill.stages.models.vocabulary import without_padding
from conftest import FAMILIES, VOCABULARY, make_model
from exports import PADDED, TOKENS, small_student
from small_runs import SmallCorpus, capture_store, save_teacher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstill.data.store.reader import StoreReader
    from coldstill.stages.export.contract import Format
    from coldstill.stages.report import Report
    from numpy.typing import NDArray

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def heldout(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """A held-out store whose documents are longer than the windows of `exports.SETTINGS`."""
    folder = tmp_path_factory.mktemp("export-student") / "heldout"
    return capture_store(corpus, saved_teacher, folder, Capture(head=8, tail=0), split="heldout")


def job_of(root: Path, heldout: StoreReader, *formats: str) -> ExportJob:
    """A job for the student in `root / "model"`."""
    return ExportJob(
        name="small",
        model=root / "model",
        facts=Facts(
            version="1",
            manifest=None,
            heldout=heldout.manifest,
            settings={"seed": 1, "student": {}},
            evaluation=None,
            teacher=None,
        ),
        formats=chosen_formats(formats, FORMATS),
        folder=root / "exports",
        heldout="this one",
    )


def depth(to: str) -> dict[str, Any]:
    """Layers of a student whose export is about something else: tracing takes seconds a layer."""
    return {"num_hidden_layers": 1} if to.startswith("onnx") else {}


def expect_packages(*formats: str) -> None:
    for name in formats:
        for package in FORMATS[name].packages:
            pytest.importorskip(package)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_without_padding_gives_the_same_logits(family: str) -> None:
    model = make_model(family, PADDED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ids = torch.from_numpy(TOKENS)[None]
        before = model(ids, use_cache=False).logits
        assert without_padding(model, VOCABULARY) is model
        after = model(ids, use_cache=False).logits
    assert torch.equal(after, before[..., :VOCABULARY])
    assert model.config.vocab_size == VOCABULARY
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.shape[0] == head.weight.shape[0] == VOCABULARY
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings


def test_removing_padding_cuts_the_head_s_bias_and_a_padding_token_beyond_the_tokens() -> None:
    model = make_model("llama", PADDED, pad_token_id=VOCABULARY + 3)
    head = torch.nn.Linear(32, PADDED, bias=True)
    model.set_output_embeddings(head)
    bias = head.bias.detach().clone()
    without_padding(model, VOCABULARY)
    assert torch.equal(model.get_output_embeddings().bias, bias[:VOCABULARY])
    assert model.config.pad_token_id is None
    assert model(torch.from_numpy(TOKENS)[None]).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize(
    ("family", "to"),
    [*itertools.product(["llama-tied"], FORMATS), ("llama", "hf"), ("llama", "gguf-q8_0")],
)
def test_exports_have_no_padding(
    family: str, to: str, tokenizer: Any, heldout: StoreReader, tmp_path: Path
) -> None:
    expect_packages(to)
    student = small_student(family, tokenizer, tmp_path / "model", **depth(to))
    (record,) = export_student(job_of(tmp_path, heldout, to), heldout)
    folder = tmp_path / "exports" / to
    runtime = FORMATS[to].open(student, folder)
    logits, _ = runtime.step(TOKENS)
    runtime.close()
    assert logits.shape == (len(TOKENS), VOCABULARY)
    assert record.check.positions > 500
    if not to.startswith("gguf"):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["vocab_size"] == VOCABULARY
    assert (record.base is None) == (FORMATS[to].base is None)
    if record.base is not None:
        assert record.base.format == FORMATS[to].base
        assert record.base.check.kl < record.check.kl
        assert record.base.limits.kl < record.limits.kl
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| format | {to} |" in page
    assert f"{record.check.positions:,} held-out positions" in page
    assert {path.name for path in (tmp_path / "exports").iterdir()} == {to}
    # the model on disk is unchanged
    model = load_model(str(tmp_path / "model"), "test", precision="fp32")
    assert model.config.vocab_size == PADDED


def test_an_export_with_padding_is_refused(
    tokenizer: Any, heldout: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_student("llama", tokenizer, tmp_path / "model")

    def copied(self: Format, student: Any, folder: Path, base: Path | None = None) -> list[str]:
        shutil.copytree(tmp_path / "model", folder, dirs_exist_ok=True)
        return []

    monkeypatch.setattr(type(FORMATS["hf"]), "write", copied)
    expected = r"export small hf: transformers \S+ gives logits of 336 tokens, expected 320; "
    with pytest.raises(ColdstillError, match=expected):
        export_student(job_of(tmp_path, heldout, "hf"), heldout)


def test_a_format_without_windows_is_checked_within_one_window(
    tokenizer: Any, heldout: StoreReader, tmp_path: Path
) -> None:
    expect_packages("gguf-q8_0")
    small_student("mistral", tokenizer, tmp_path / "model")
    reports: list[Report] = []
    job = job_of(tmp_path, heldout, "hf", "gguf-f16", "gguf-q8_0")
    whole, f16, q8 = export_student(job, heldout, reports.append)
    for record in (f16, q8):
        (note,) = record.notes
        assert note.startswith("its context is 24 tokens, that of its sliding window, and it was")
        assert record.check.positions < whole.check.positions
        assert 0 < record.sample["export"]["positions"] < whole.sample["export"]["positions"]
        assert any(each.note == note for each in reports)


def doubled_base(model: Any) -> None:
    rope, rotary = model.config.rope_parameters, model.model.rotary_emb
    rope["rope_theta"] *= 2
    places = torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq)
    rotary.inv_freq.copy_(rope["rope_theta"] ** -places)


def silent_head(model: Any) -> None:
    weight = model.model.layers[0].self_attn.o_proj.weight
    weight[:, : weight.shape[1] // 4] = 0.0


def mean_norms(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "layernorm" in name:
            weight.fill_(weight.mean())


@pytest.mark.parametrize(
    ("to", "fault"),
    [
        *itertools.product(["gguf-q8_0", "torchao-int8"], [silent_head, mean_norms]),
        # only llama.cpp reads the settings in the file
        pytest.param("gguf-q8_0", doubled_base, marks=pytest.mark.llama_cpp),
        ("torchao-int8", doubled_base),
        ("onnx-int8", mean_norms),
    ],
)
def test_an_error_that_rounding_could_hide_is_found_before_quantising(
    to: str,
    fault: Callable[[Any], None],
    tokenizer: Any,
    heldout: StoreReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_packages(to)
    small_student("llama", tokenizer, tmp_path / "model", **depth(to))
    base = FORMATS[to].base
    assert base is not None
    form = type(FORMATS[base])
    write = form.write

    def spoil(self: Any, student: Any, folder: Path, base: Path | None = None) -> Any:
        if self.base is None:
            model = copy.deepcopy(student.model)
            with torch.no_grad():
                fault(model)
            model.save_pretrained(folder.parent / "spoilt")
            student = replace(student, model=model, folder=folder.parent / "spoilt")
        return write(self, student, folder, base)

    monkeypatch.setattr(form, "write", spoil)
    expected = rf"export small {to}: before it is quantised \({base}\): .* does not reproduce the "
    with pytest.raises(ColdstillError, match=expected):
        export_student(job_of(tmp_path, heldout, to), heldout)
    assert not (tmp_path / "exports" / to).exists()


@pytest.mark.parametrize(
    "later", [pytest.param("llama.cpp", marks=pytest.mark.llama_cpp), "the reader again"]
)
def test_an_export_is_checked_again_once_its_runtime_is_installed(
    later: str,
    tokenizer: Any,
    heldout: StoreReader,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expect_packages("gguf-q8_0")
    from coldstill.stages.export.gguf import format as gguf
    from coldstill.stages.export.gguf.runtimes import read_back
    from coldstill.stages.export.reference import TorchRuntime

    small_student("llama", tokenizer, tmp_path / "model")
    job, notes = job_of(tmp_path, heldout, "gguf-q8_0"), list[str]()

    def note(report: Report) -> None:
        notes.extend([report.note] if report.note else [])

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "has_llama_cpp", lambda: False)
        (before,) = export_student(job, heldout, note)
        assert notes.pop().endswith("'coldstill[llama]', then run the same command again")
        assert export_student(job, heldout, note) == [before]
        assert notes.pop().endswith("which is not installed: pip install 'coldstill[llama]')")
    assert before.checked_by_own_runtime is False
    if later != "llama.cpp":  # stands for it
        monkeypatch.setattr(gguf.Gguf, "missing_runtime", None)

        def opened(self: Any, student: Any, folder: Path) -> Any:
            (path,) = folder.glob("*.gguf")
            return TorchRuntime(read_back(path, student).model, "llama.cpp")

        monkeypatch.setattr(gguf.Gguf, "open", opened)
    path = tmp_path / "exports" / "gguf-q8_0" / "small-q8_0.gguf"
    written = path.stat().st_mtime_ns, path.stat().st_ino
    (after,) = export_student(job, heldout, note)
    assert notes.pop().startswith("checked again: ")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    assert after.checked_by_own_runtime is True
    assert after.base is not None
    assert after.base.checked_by.startswith("llama.cpp")
    assert after.costs.generation
    assert "by llama.cpp" in (path.parent / "README.md").read_text(encoding="utf-8")
    assert export_student(job, heldout, note) == [after]
    assert notes.pop().endswith("already exported: " + str(path.parent))


@pytest.mark.llama_cpp
def test_an_export_that_llama_cpp_refuses_later_stays(
    tokenizer: Any, heldout: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coldstill.stages.export.gguf import architectures
    from coldstill.stages.export.gguf import format as gguf

    small_student("llama", tokenizer, tmp_path / "model")
    job, rotary = job_of(tmp_path, heldout, "gguf-q8_0"), architectures.rotary

    def doubled(config: Any) -> Any:  # a setting that only llama.cpp reads
        return [{**each, "rope_theta": 2 * each["rope_theta"]} for each in rotary(config)]

    monkeypatch.setattr(architectures, "rotary", doubled)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "has_llama_cpp", lambda: False)
        export_student(job, heldout)
    folder = tmp_path / "exports" / "gguf-q8_0"
    with pytest.raises(ColdstillError, match=rf"does not reproduce .*; delete {folder}"):
        export_student(job, heldout)
    assert (folder / "small-q8_0.gguf").exists()


@pytest.fixture(scope="module")
def whole_heldout(
    corpus: SmallCorpus, saved_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """A held-out store with the whole distribution."""
    folder, capture = tmp_path_factory.mktemp("whole") / "heldout", Capture(head=VOCABULARY, tail=0)
    return capture_store(corpus, saved_teacher, folder, capture, split="heldout")


@pytest.fixture(scope="module")
def student_folder(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("student") / "model", tokenizer, seed=2)


@pytest.fixture(scope="module")
def student(student_folder: Path) -> TorchRuntime:
    model = load_model(str(student_folder), "test", precision="fp32")
    return TorchRuntime(without_padding(model, VOCABULARY), "torch")


class Faulty(Runtime):
    """The student with changed logits."""

    title = "faulty"

    def __init__(
        self,
        student: TorchRuntime,
        shift: float = 0.0,
        cached_shift: float = 0.0,
        padding: int = 0,
        broken: NDArray[Any] | None = None,
    ) -> None:
        """Shift token 0, or only after a cache; append rows; give NaN for one document."""
        self.student, self.shift, self.cached_shift = student, shift, cached_shift
        self.padding, self.broken = padding, broken

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        logits, after = self.student.step(tokens_T, cache)
        logits = np.pad(logits, ((0, 0), (0, self.padding)), constant_values=-9.0)
        logits[:, 0] += self.shift + (self.cached_shift if cache is not None else 0.0)
        if self.broken is not None and np.array_equal(tokens_T, self.broken):
            logits[0, 5] = np.nan
        return logits, after


def test_the_sample_has_every_document_of_a_small_store_once(whole_heldout: StoreReader) -> None:
    documents = sampled_documents(whole_heldout)
    sequences = whole_heldout.read(np.arange(len(whole_heldout))).sequences
    found = sorted(document.tokens_T.tolist() for document in documents)
    expected = []
    for row in range(len(sequences)):
        pieces = np.split(sequences.tokens[row], sequences.document_starts[row][1:])
        expected += [piece.tolist() for piece in pieces if len(piece) > 1]
    assert found == sorted(expected)
    assert sum(len(d.positions_M) for d in documents) == whole_heldout.positions
    for whole in documents:
        labels = whole.tokens_T[whole.positions_M + 1]
        assert whole.target.labels.tolist() == labels.tolist()
        # a cut document keeps the positions whose label it keeps
        cut = whole.within(7)
        assert cut.tokens_T.tolist() == whole.tokens_T[:7].tolist()
        kept = whole.positions_M[whole.positions_M + 1 < min(7, len(whole.tokens_T))]
        assert cut.positions_M.tolist() == kept.tolist()
        assert cut.target.labels.tolist() == cut.tokens_T[cut.positions_M + 1].tolist()

    few, again = (sampled_documents(whole_heldout, tokens=60) for _ in range(2))
    assert 0 < len(few) < len(documents)
    assert [d.tokens_T.tolist() for d in few] == [d.tokens_T.tolist() for d in again]


def test_figures_of_the_student_itself_are_those_of_its_evaluation(
    student_folder: Path, student: TorchRuntime, whole_heldout: StoreReader
) -> None:
    compared = compare(student, student, sampled_documents(whole_heldout), VOCABULARY)
    fidelity = compared.fidelity
    assert (fidelity.largest_difference, fidelity.kl, fidelity.agreement) == (0.0, 0.0, 1.0)
    assert fidelity.cached_difference < 1e-4
    whole = evaluate_student("s", student_folder, whole_heldout)
    for name in ("loss", "kl", "agreement", "accuracy", "acceptance", "ece", "perplexity"):
        assert compared.figures[name] == pytest.approx(getattr(whole, name), rel=1e-4), name
    assert compared.figures["positions"] == whole.positions


def test_distances_equal_the_dense_formulas(
    student: TorchRuntime, whole_heldout: StoreReader
) -> None:
    documents, shift = sampled_documents(whole_heldout), 2.0
    fidelity = compare(student, Faulty(student, shift), documents, VOCABULARY).fidelity
    logits = [student.step(document.tokens_T)[0] for document in documents]
    p = torch.from_numpy(np.concatenate(logits)).double()
    q = p.clone()
    q[:, 0] += shift
    p, q = p.log_softmax(1), q.log_softmax(1)
    assert fidelity.positions == len(p)
    entropy = -float((p.exp() * p).sum(1).mean())
    assert fidelity.information == pytest.approx(math.log(VOCABULARY) - entropy, rel=1e-6)
    assert fidelity.largest_difference == pytest.approx(float((p - q).abs().max()), rel=1e-6)
    assert fidelity.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-6)
    assert fidelity.agreement == float((p.argmax(1) == q.argmax(1)).double().mean())


SOUND = Fidelity(
    documents=1,
    positions=10,
    largest_difference=0.01,
    kl=1e-6,
    information=1.0,
    agreement=0.99,
    cached_difference=0.01,
)
LIMITS = Limits(logprob=0.1, kl=1e-4, share=0.01, cached=0.1, agreement=0.9)


def test_a_wrong_cache_other_tokens_and_nan_are_found(
    student: TorchRuntime, whole_heldout: StoreReader
) -> None:
    documents = sampled_documents(whole_heldout)
    forgets = Faulty(student, cached_shift=1.0)
    fidelity = compare(student, forgets, documents, VOCABULARY).fidelity
    assert fidelity.largest_difference == 0.0
    assert fidelity.cached_difference > 0.1
    with pytest.raises(ColdstillError, match="gives logits of 336 tokens, expected 320"):
        compare(student, Faulty(student, padding=16), documents, VOCABULARY)
    broken = Faulty(student, broken=documents[0].tokens_T)
    fidelity = compare(student, broken, documents, VOCABULARY).fidelity
    assert math.isnan(fidelity.largest_difference)
    assert fidelity.excess(LIMITS) is not None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("largest_difference", 0.2, "largest difference 0.2 (at most 0.1)"),
        ("kl", 1e-3, "KL 0.001 (at most 0.0001)"),
        ("information", 1e-5, "KL 1e-06 (at most 1e-07)"),
        ("cached_difference", 5.0, "largest difference with its cache 5 (at most 0.1)"),
        ("agreement", 0.5, "top-1 agreement 50.0% (at least 90.0%)"),
        ("largest_difference", math.nan, "largest difference nan (at most 0.1)"),
        ("kl", math.inf, "KL inf (at most 0.0001)"),
    ],
)
def test_each_limit_refuses_alone(name: str, value: float, expected: str) -> None:
    assert SOUND.excess(LIMITS) is None
    changed: Any = {name: value}
    assert replace(SOUND, **changed).excess(LIMITS) == expected
