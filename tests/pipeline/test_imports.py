"""The command that imports a cache, and students that learn from what it made."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import coldstill
import numpy as np
import pytest
import torch
from caches import WRITERS, K, Known, known
from click.testing import CliRunner
from coldstill.data.maintenance.verify import verify
from coldstill.pipeline.cli.commands import main
from coldstill.pipeline.pages.compare.plots import make_plots
from coldstill.pipeline.results.figures import ModelFigures
from coldstill.pipeline.results.model_tables import tables
from coldstill.pipeline.results.verdict import Training, verdict
from coldstill.stages.evaluate import evaluate_student, evaluate_teacher
from conftest import VOCABULARY, make_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def cache(tokenizer: Any) -> Known:
    return known(tokenizer)


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(each) for each in arguments])


def learn(store: coldstill.StoreReader, cache: Known) -> list[tuple[float, float]]:
    """Train a student by kl: its loss and its KL to the dense teacher, at the start and the end."""
    steps = 60
    model = make_model("llama", VOCABULARY, seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = coldstill.collate((store.read(np.arange(len(store))),))
    kl = coldstill.losses.loss("kl")
    dense = torch.tensor(np.concatenate([logp[:-1] for logp in cache.logprobs]))
    figures = []
    for step in range(steps + 1):
        logits = model(**batch.inputs, use_cache=False).logits.flatten(0, 1)[batch.positions]
        loss = kl(logits, batch.targets).mean()
        if step in (0, steps):
            own = logits.detach().double().log_softmax(1)
            figures.append(
                (float(loss.detach()), float((dense.exp() * (dense - own)).sum(1).mean()))
            )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return figures


@pytest.mark.parametrize("kind", ["raw", "raw-kept"])
def test_a_student_learns_from_an_import_as_from_our_own_capture(
    kind: str, cache: Known, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Loss and KL to the teacher fall. The same head written by us trains the same student; where
    the source lost the mass, the student learns the head alone."""
    WRITERS[kind](tmp_path / kind, cache)
    done = cli("import", tmp_path / kind, tmp_path / "store", "--tokenizer", tokenizer_folder)
    assert done.exit_code == 0, done.output
    store = coldstill.open_store(tmp_path / "store")
    (loss, divergence), (final_loss, final_divergence) = learn(store, cache)
    assert final_loss < 0.5 * loss
    assert final_divergence < 0.8 * divergence
    with coldstill.StoreWriter(
        tmp_path / "own", teacher="dense", tokenizer=str(tokenizer_folder), codec="plain",
        capture=coldstill.Capture(head=K, tail=0, mass=kind == "raw"), sequence_length=200,
    ) as writer:  # fmt: skip
        for document, tokens in enumerate(cache.tokens):
            ids, logprobs = cache.heads(document)
            values = np.array(logprobs)
            if kind != "raw":
                values -= np.log(np.exp(values).sum(1, keepdims=True))
            writer.add(tokens, head_ids=ids, head_logprobs=values)
    assert list(verify(str(tmp_path / "own"))) == []
    other = learn(coldstill.open_store(tmp_path / "own"), cache)
    assert other[1][0] == pytest.approx(final_loss, rel=0.01)
    assert other[1][1] == pytest.approx(final_divergence, rel=0.01)
    batch = coldstill.collate((store.read(np.arange(2)),))
    jsd = coldstill.losses.loss("jsd")
    logits = torch.zeros(len(batch.targets), VOCABULARY)
    if kind == "raw":
        assert jsd(logits, batch.targets).shape == (len(batch.targets),)
    else:
        with pytest.raises(coldstill.ColdstillError, match="imported without the mass outside"):
            jsd(logits, batch.targets)


def test_the_command_says_what_it_found_and_inspect_where_a_store_came_from(
    cache: Known, tokenizer_folder: Path, tmp_path: Path
) -> None:
    WRITERS["prepared-own"](tmp_path / "source", cache)
    store = tmp_path / "store"
    arguments = ["import", tmp_path / "source", store, "--tokenizer", tokenizer_folder]
    done = cli(*arguments, "--teacher", "ORG/large", "--heldout", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (facts["complete"], facts["sequences"], facts["head"]) == (True, len(cache.tokens), K)
    assert facts["imported"]["alignment"] == "own"
    for said in (
        "import: alignment: rows are about their own token",
        "import: no mass outside the head: the source renormalised over the kept tokens",
        "rows about the next token: label in ",
    ):
        assert said in done.stderr
    shown = cli("inspect", store)
    assert shown.exit_code == 0, shown.output
    for line in (
        "teacher     ORG/large (its weights are not known)",
        "from        imported from axolotl: ",
        "lacks       no mass outside the head",
        "counted     ",
    ):
        assert line in shown.output
    assert cli("store", "verify", store).exit_code == 0
    again = cli(*arguments, "--teacher", "ORG/large", "--heldout")
    assert again.exit_code == 0
    assert "already done" in again.stderr
    assert coldstill.open_store(store).manifest.corpus.split == "heldout"


def test_figures_that_need_a_mass_that_the_source_lost_are_left_out(
    cache: Known, tokenizer: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """By evaluate, compare, the verdict of a report, a model card, and inspect, with the reason.
    The same head whose mass is known has all of them."""
    model = make_model("llama", VOCABULARY, seed=3)
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    missing = {"acceptance"}, {"acceptance", "loss", "perplexity", "bits_per_byte", "ece"}
    for kind, lost in (("raw-kept", True), ("raw", False)):
        WRITERS[kind](tmp_path / kind, cache)
        address = tmp_path / f"store-{kind}"
        done = cli("import", tmp_path / kind, address, "--tokenizer", tokenizer_folder, "--heldout")
        assert done.exit_code == 0, done.output
        store = coldstill.open_store(address)
        student = evaluate_student("student", tmp_path / "student", store)
        rows = []
        for found, absent in zip((student, evaluate_teacher(store)), missing, strict=True):
            text = json.dumps(asdict(found))
            row = ModelFigures.model_validate_json(text)
            rows.append(row.model_copy(update={"generation": ()}))
            unknown = {name for name, value in asdict(found).items() if value is None}
            assert unknown & missing[1] == (absent if lost else set())
            assert bool(found.calibration) == (found is student or not lost)
        shown = tables(rows)
        reason = "the held-out store lacks the mass outside the teacher's head"
        assert ("kl is of the head alone; acceptance, and the teacher's" in shown) == lost
        assert ("kl and acceptance are lower bounds" in shown) != lost
        assert (
            f"acceptance: not known for student, teacher: {reason}" in shown.replace("\n", " ")
        ) == lost
        known = {"student": Training(uses_teacher=True, origin="x", settings={})}
        told = verdict([rows[1], rows[0]], known)
        assert ("the teacher's own is not known" in told) == lost
        assert make_plots(rows, {})
        shown, page = cli("inspect", address).output, tmp_path / f"{kind}.html"
        for text in ("perplexity", r"entropy \d", "head holds", "by probability inside the head"):
            assert (re.search(text, shown) is None) == lost, text
        assert "top-1 accuracy" in shown
        facts = json.loads(cli("inspect", address, "--json").output)
        assert (facts["teacher_loss"] is None) == (facts["head_mass"] is None) == lost
        assert (sum(facts["histograms"]["entropy"]["positions"]) == 0) == lost
        assert cli("inspect", address, "--sequence", 0, "--html", page).exit_code == 0
        assert ("not known" in cli("inspect", address, "--sequence", 0).output) == lost


def test_the_parameters_beside_the_data_are_found(
    cache: Known, tokenizer_folder: Path, tmp_path: Path
) -> None:
    WRITERS["distillkit"](tmp_path / "source", cache)
    done = cli("import", tmp_path / "source/data_0.parquet", tmp_path / "store",
               "--tokenizer", tokenizer_folder)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "parameters are those of" in done.stderr
    address = f"file://{tmp_path}/source"
    for number, entry in enumerate((address, f"{address}/*.parquet")):
        to = tmp_path / f"remote{number}"
        done = cli("import", entry, to, "--tokenizer", tokenizer_folder)
        assert done.exit_code == 0, done.output
        assert f"parameters are those of {address}/compression_config.json" in done.stderr
    file = tmp_path / "source/compression_config.json"
    (tmp_path / "c.yaml").write_text(f"teacher: {{logprob_compressor: {file.read_text()}}}")
    file.unlink()
    source = tmp_path / "source"
    arguments = ["import", source, tmp_path / "b", "--tokenizer", tokenizer_folder]
    refused = cli(*arguments)
    assert refused.exit_code == 1
    assert "the bytes mean nothing without the parameters" in refused.stderr
    assert not (tmp_path / "b").exists()
    assert cli(*arguments, "--config", tmp_path / "c.yaml").exit_code == 0
    missing = cli(*arguments[:2], tmp_path / "c", *arguments[3:], "--config", tmp_path / "none")
    assert "error: --config" in missing.stderr


@pytest.mark.slow
def test_processes_share_an_import(cache: Known, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Two at the same time make the store that one makes."""
    many = Known(cache.tokens * 30, cache.logprobs * 30)
    WRITERS["raw"](tmp_path / "source", many)
    code = (
        "import sys\n"
        "from coldstill.data.imports.importing import Importer\n"
        "from coldstill.data.imports.plan import Request\n"
        "request = Request(source=(sys.argv[1],), store=sys.argv[2], tokenizer=sys.argv[3],\n"
        "                  shard_tokens=400)\n"
        "Importer(request, lambda *_: None, print).run()\n"
    )

    def start(store: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / store)]
        return subprocess.Popen([*words, str(tokenizer_folder)], stdout=subprocess.PIPE, text=True)

    alone = start("alone")
    pair = [start("shared"), start("shared")]
    for process in (alone, *pair):
        process.communicate(timeout=100)
        assert process.returncode == 0
    files = [p for p in (tmp_path / "alone").rglob("*") if p.is_file()]
    assert len(files) > 60
    for file in files:
        other = tmp_path / "shared" / file.relative_to(tmp_path / "alone")
        assert other.read_bytes() == file.read_bytes(), file
    assert list(verify(str(tmp_path / "shared"))) == []


def test_sources_in_other_places(cache: Known, tokenizer_folder: Path, tmp_path: Path) -> None:
    """A glob, an fsspec address and a data set that `datasets` loads give the same rows."""
    import fsspec

    WRITERS["raw"](tmp_path / "source", cache)
    file = tmp_path / "source/rows.parquet"
    with fsspec.open("memory://imports/rows.parquet", "wb") as stream:
        stream.write(file.read_bytes())
    wanted = None
    for number, source in enumerate(
        (f"{tmp_path}/source/*.parquet", "memory://imports", f"hub:{tmp_path}/source")
    ):
        store = tmp_path / str(number)
        done = cli("import", source, store, "--tokenizer", tokenizer_folder)
        assert done.exit_code == 0, done.output
        found = coldstill.open_store(store)
        hashes = found.read(np.arange(len(found))).sequences.hashes.tolist()
        wanted = wanted or hashes
        assert hashes == wanted
    assert wanted is not None
    assert len(wanted) == len(cache.tokens)


def test_a_source_that_is_not_there_is_refused_before_a_tokenizer_is_looked_for(
    tmp_path: Path,
) -> None:
    for arguments in (
        ("import", str(tmp_path / "no.parquet"), str(tmp_path / "store")),
        ("store", "retokenize", str(tmp_path / "no"), str(tmp_path / "store")),
    ):
        result = CliRunner().invoke(main, [*arguments, "--tokenizer", "no/such-tokenizer"])
        assert result.exit_code == 1
        assert "tokenizer" not in result.stderr.splitlines()[-1]
        assert not (tmp_path / "store").exists()
