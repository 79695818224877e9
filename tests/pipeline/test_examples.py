"""The example scripts and the public interface that they use."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import coldstill
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from coldstill.data.maintenance.verify import verify
from coldstill.pipeline.cli.commands import main
from refusals import refusal
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from coldstill.data.store.reader import StoreReader

EXAMPLES = Path(__file__).parents[2] / "pipeline" / "examples"


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run an example as a script; its variables afterwards."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ["training_loop.py", "training_with_trainer.py"])
def test_a_training_loop_has_at_most_25_lines_and_trains_a_student(
    name: str, store: StoreReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = ast.parse((EXAMPLES / name).read_text(encoding="utf-8"))
    tree.body = tree.body[1:]  # without the docstring
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    assert len({node.lineno for node in statements}) <= 25
    torch.manual_seed(0)
    left = run(name, store.place, tmp_path, monkeypatch=monkeypatch)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    def kl(student: Any) -> float:
        rows = coldstill.collate((store.read(np.arange(16)),))
        with torch.no_grad():
            logits = student(**rows.inputs, use_cache=False).logits.flatten(0, 1)[rows.positions]
            return float(left["kl"](logits, rows.targets).mean())

    assert kl(model) < kl(type(model)(model.config)) - 0.01


def test_a_store_written_by_hand_is_whole_and_trains_a_student(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    run("write_a_store.py", tokenizer_folder, store, monkeypatch=monkeypatch)
    assert list(verify(str(store))) == []
    assert len(coldstill.open_store(store)) == 24
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        name = "own"
        corpus = {{ files = ["stdlib:"], sequence_length = 64 }}
        teacher = {{ model = "made-up" }}
        logits = {{ head = 4, tail = 0, path = "{store}" }}
        students.small.architecture = {{ layers = 1, hidden = 32, heads = 2 }}
        students.small.train = {{ steps = 2, batch_tokens = 256 }}
        """,
        encoding="utf-8",
    )
    arguments = ["train-student", str(recipe), "--runs", str(tmp_path / "runs")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs/own/students/small/model/config.json").is_file()


def test_any_teacher_in_a_loop_makes_a_store(
    tokenizer_folder: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of transformers, which must agree with its own logits, and pairs of tokens in numpy."""
    left = run(
        "store_from_transformers.py", teacher_folder, tmp_path / "t", monkeypatch=monkeypatch
    )
    store = coldstill.open_store(tmp_path / "t")
    block = store.read(np.arange(3))
    ids = torch.tensor([block.sequences.tokens[1].tolist()])
    with torch.no_grad():
        logits = left["teacher"](ids).logits[0, :-1, : store.manifest.tokenizer.size]
    own = slice(*block.sequences.positions.offsets[1:3].tolist())
    top = logits.log_softmax(1).topk(4, 1)
    # the codec rounds probabilities, so that close ones may change places
    np.testing.assert_array_equal(np.sort(block.targets.head_ids[own]), np.sort(top.indices))
    run("store_from_ngrams.py", tokenizer_folder, tmp_path / "n", monkeypatch=monkeypatch)
    for name in ("t", "n"):
        assert list(verify(str(tmp_path / name))) == []
        assert len(coldstill.open_store(tmp_path / name)) == 24


def test_importing_coldstill_loads_no_torch_and_lists_the_lazy_names() -> None:
    code = (
        "import sys, coldstill; loaded = set(sys.modules); "
        "assert not loaded & {'torch', 'transformers', 'tokenizers'}; "
        "assert set(coldstill.__all__) <= set(dir(coldstill)); "
        "coldstill.StoreDataset, coldstill.Batch, coldstill.collate; "
        "coldstill.losses.loss('jsd', beta=0.25)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coldstill.nothing


def test_a_loss_refuses_what_it_cannot_compute(store: StoreReader) -> None:
    batch = coldstill.collate((store.read(np.arange(2)),))
    logits = torch.zeros(len(batch.targets), store.manifest.tokenizer.size)
    assert coldstill.losses.loss("jsd")(logits, batch.targets).shape == (len(batch.targets),)
    for call, message in (
        (lambda: coldstill.losses.loss("k"), "losses: 'k': expected one of kl, "),
        (lambda: coldstill.losses.loss("kl", beta=1), "losses: kl has no parameter 'beta'"),
        (lambda: coldstill.losses.loss("jsd", beta=2), "jsd: beta = 2: expected 0 to 1"),
        (lambda: coldstill.losses.loss("jsd", skew=1), "has no parameter 'skew'; it has beta"),
        (
            lambda: coldstill.losses.loss("kl", temperature=3.0)(logits, batch.targets),
            "losses: kl: temperature 3.0 was not captured",
        ),
        (
            lambda: coldstill.losses.loss("kl")(logits[1:], batch.targets),
            "one row per supervised position",
        ),
    ):
        with pytest.raises(coldstill.ColdstillError, match=message):
            call()


def test_a_name_in_place_of_a_list_or_an_open_store_is_refused() -> None:
    wrong: Any = "small"
    listed = "'small': expected a list of strings"
    for call, message in (
        (lambda: coldstill.run("demo", settings=wrong), f"settings = {listed}"),
        (lambda: coldstill.compare("demo", settings=wrong), f"settings = {listed}"),
        (lambda: coldstill.train_students("demo", students=wrong), f"students = {listed}"),
        (lambda: coldstill.evaluate("demo", students=wrong), f"students = {listed}"),
        (lambda: coldstill.export("demo", "small", wrong), f"formats = {listed}"),
        (lambda: coldstill.StoreDataset(wrong), "'small' is not an open store"),
    ):
        assert message in refusal(call)
