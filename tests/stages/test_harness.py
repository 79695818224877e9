"""Models in lm-eval: the figures by hand, no hub, no noise."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from coldstill.data.errors import ColdstillError
from conftest import VOCABULARY
from small_runs import save_teacher
from small_tasks import LAST, PROSE, QUIZ, WRITE, logprob, quiz, write_task, written
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

from coldstill.stages.evaluation.lm_eval.loading import TaskSource, harness
from coldstill.stages.evaluation.lm_eval.running import Examinee, HarnessModel, TaskResult

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.report import Report

pytest_plugins = ("networkless",)
pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model whose rows past the vocabulary are surer than all others."""
    return save_teacher(tmp_path_factory.mktemp("harness") / "model", tokenizer)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def source(path: Path, **changes: Any) -> TaskSource:
    data = path.with_suffix(".jsonl")
    located = {"dataset_kwargs": {"data_files": {"test": str(data)}}} if data.exists() else {}
    return TaskSource(name=path.stem, path=path, located=located, **changes)


def results(
    folder: Path,
    path: Path,
    limit: int | None = None,
    reports: list[Report] | None = None,
    **changes: Any,
) -> list[TaskResult]:
    told = [] if reports is None else reports
    with harness([source(path, **changes)]) as opened:
        loaded = opened.load(path.stem)
        return Examinee(HarnessModel(name="m", folder=str(folder)), told.append).take(
            path.stem, loaded, limit
        )


def test_choices_are_compared_by_their_probability(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = quiz()
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in rows:
        sums = np.array(
            [
                logprob(model, tokenizer, row["question"], f" {answer}", VOCABULARY)
                for answer in row["answers"]
            ]
        )
        lengths = np.array([len(answer) for answer in row["answers"]])
        right["acc"].append(sums.argmax() == row["right"])
        right["acc_norm"].append((sums / lengths).argmax() == row["right"])
    assert right["acc"] != right["acc_norm"]
    (result,) = results(folder, write_task(tmp_path, "quiz", QUIZ, rows))
    assert (result.main, result.examples, result.few_shot) == ("acc", len(rows), 0)
    for name, hits in right.items():
        score = result.metrics[name]
        assert score.value == pytest.approx(np.mean(hits))
        assert score.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
        assert score.higher_is_better


def test_texts_are_measured_over_the_tokenizers_vocabulary(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"text": row["question"]} for row in quiz(9)]

    def bits(size: int) -> float:
        total = sum(logprob(model, tokenizer, "", row["text"], size) for row in rows)
        return -total / sum(len(row["text"].encode()) for row in rows) / math.log(2)

    (result,) = results(folder, write_task(tmp_path, "prose", PROSE, rows))
    assert result.metrics["bits_per_byte"].value == pytest.approx(bits(VOCABULARY), rel=1e-5)
    assert bits(VOCABULARY + 16) > 1.01 * bits(VOCABULARY)


def test_the_error_of_a_perplexity_is_that_of_its_resamples(
    folder: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = quiz(12)
    sums = np.array(
        [
            logprob(model, tokenizer, row["question"], f" {row['answers'][0]}", VOCABULARY)
            for row in rows
        ]
    )
    (result,) = results(folder, write_task(tmp_path, "last", LAST, rows))
    score = result.metrics["perplexity"]
    assert score.value == pytest.approx(np.exp(-sums.mean()), rel=1e-5)
    draws = np.random.default_rng(0).choice(sums, (20000, len(sums)))
    assert score.stderr == pytest.approx(np.exp(-draws.mean(1)).std(), rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_what_is_written_is_what_the_model_writes(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    folder = save_teacher(tmp_path / "model", tokenizer, family)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [{"question": row["question"]} for row in quiz(8)]
    for i, row in enumerate(rows):
        text = written(model, tokenizer, row["question"], 6, VOCABULARY)
        row["answer"] = f"not {text}" if i % 4 == 3 else text
    assert len({row["answer"] for row in rows}) > 2
    (result,) = results(folder, write_task(tmp_path, "write", WRITE, rows))
    assert result.metrics["exact_match"].value == pytest.approx(0.75)


def test_the_first_examples_alone(folder: Path, tmp_path: Path) -> None:
    rows = quiz(10)
    (some,) = results(folder, write_task(tmp_path / "a", "quiz", QUIZ, rows), limit=4)
    (all_of_four,) = results(folder, write_task(tmp_path / "b", "quiz", QUIZ, rows[:4]))
    assert some == all_of_four
    assert some.examples == 4


def test_requests_are_told_and_nothing_else_is_heard(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lm_eval")
    before = (logger.handlers, logger.propagate, dict(os.environ))
    reports: list[Report] = []
    results(folder, write_task(tmp_path, "quiz", QUIZ, quiz(4)), reports=reports)
    counted = [r for r in reports if not r.doing]
    assert {(r.stage, r.unit) for r in counted} == {("evaluate m quiz", "requests")}
    assert [r.done for r in counted] == list(range(13))
    assert {r.total for r in counted[1:]} == {12}
    assert capfd.readouterr() == ("", "")
    assert (logger.handlers, logger.propagate, dict(os.environ)) == before


def test_bars_are_drawn_where_they_would_be_without_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_task(tmp_path, "quiz", QUIZ, quiz(1))
    with harness([source(path)]) as opened:
        examinee = Examinee(
            HarnessModel(name="m", folder=str(folder)),
            lambda r: print(r.doing or r.done, file=sys.stderr),
        )
        examinee.take("quiz", opened.load("quiz"), None)
    assert capsys.readouterr().err.splitlines() == ["load the model", "0", "1", "2", "3"]


@pytest.mark.parametrize("task", [QUIZ, PROSE, WRITE])
def test_requests_that_lose_their_beginning_are_counted(
    folder: Path, tmp_path: Path, task: dict[str, Any]
) -> None:
    long = "the teacher speaks " * 60
    rows = [
        {**row, "question": text, "text": text, "answer": "x"}
        for row, text in zip(quiz(2), ("short", long), strict=True)
    ]
    reports: list[Report] = []
    results(folder, write_task(tmp_path, "long", task, rows), reports=reports)
    notes = [r.note for r in reports if r.note]
    cut = {"multiple_choice": 3, "generate_until": 1}.get(task["output_type"])
    if cut is None:  # read window by window
        assert notes == []
    else:
        assert notes == [
            f"{cut} requests are longer than the model's context of 128 tokens and lost their "
            "beginning"
        ]


def refusal(folder: Path, path: Path, **changes: Any) -> str:
    with pytest.raises(ColdstillError) as caught:
        results(folder, path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_hub_is_off_and_afterwards_as_it_was(folder: Path, tmp_path: Path) -> None:
    import datasets
    import huggingface_hub

    path = write_task(tmp_path, "away", {**QUIZ, "dataset_path": "org/away"})
    assert refusal(folder, path, distant=("org/away",)) == (
        f"{path}: task 'away' reads the data set 'org/away', which is not on this machine; with "
        "--download it is fetched"
    )
    with harness([]):
        assert huggingface_hub.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
        assert os.environ["HF_DATASETS_OFFLINE"] == "1"
    assert not huggingface_hub.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE
    assert "HF_DATASETS_OFFLINE" not in os.environ


def test_what_lm_eval_ships_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text('{"group": "g", "task": ["arc_easy"]}', encoding="utf-8")
    with harness([source(path)]) as opened, pytest.raises(ColdstillError, match=r"^\S+g\.yaml: "):
        opened.load("g")


def test_metrics_are_asked_for_before_they_are_needed(folder: Path, tmp_path: Path) -> None:
    path = write_task(tmp_path, "quiz", QUIZ, quiz(1))
    assert refusal(folder, path, metrics=(("accc", False),)) == (
        f"{path}: task 'quiz': no metric 'accc' in lm-eval; --download looks for it on the hub too"
    )
    told = refusal(folder, path, metrics=(("acc", False),), aggregations=("mode",))
    assert told.endswith("task 'quiz': no aggregation 'mode' in lm-eval")


def test_tasks_that_run_code_or_show_pictures_are_refused(folder: Path, tmp_path: Path) -> None:
    path = write_task(tmp_path, "code", {**QUIZ, "unsafe_code": True}, quiz(1))
    assert "task 'code': its 'unsafe_code' runs what the model writes" in refusal(folder, path)
    path = write_task(tmp_path, "photo", {**QUIZ, "doc_to_image": ["question"]}, quiz(1))
    assert "task 'photo': it shows pictures" in refusal(folder, path)


def test_faults_of_a_task_are_one_line(folder: Path, tmp_path: Path) -> None:
    path = write_task(tmp_path, "quiz", {**QUIZ, "doc_to_text": "{{q | nope}}"}, quiz(1))
    assert refusal(folder, path).endswith("No filter named 'nope'.")
    path = write_task(tmp_path, "broken", QUIZ, quiz(1))
    path.with_suffix(".jsonl").write_text('{"a": 1\n{', encoding="utf-8")
    assert f"{path}: task 'broken': ArrowInvalid: JSON parse error" in refusal(folder, path)
    rows = [{**row, "answers": ["the teacher " * 99] * 3} for row in quiz(1)]
    told = refusal(folder, write_task(tmp_path, "long", QUIZ, rows))
    assert told.startswith("evaluate m: task 'long': lm-eval cannot finish it: ValueError: an ans")
    prose = {**PROSE, "metric_list": [{"metric": "word_perplexity"}]}
    path = write_task(tmp_path, "word", prose, [{"text": "teacher" * 300}])
    assert "a perplexity is too large for a number; ask for bits_per_byte" in refusal(folder, path)
