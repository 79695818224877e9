"""Models in lm-eval: figures computed by hand, no network, no output."""

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

from coldstill.stages.evaluation.lm_eval.loading import load_units, offline
from coldstill.stages.evaluation.lm_eval.running import EvaluatedModel, TaskRunner
from coldstill.stages.evaluation.lm_eval.task_files import read_tasks, units

if TYPE_CHECKING:
    from pathlib import Path

    from coldstill.stages.evaluation.lm_eval.results import TaskResult
    from coldstill.stages.report import Report, Reporter

pytest_plugins = ("networkless",)
pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture(scope="module")
def model(saved_teacher: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved_teacher).eval()


def results(
    folder: Path, path: Path, limit: int | None = None, report: Reporter = lambda one: None
) -> list[TaskResult]:
    with offline():
        tasks = read_tasks([path])
        (unit,) = units(tasks)
        loaded = load_units(tasks.values(), [unit])[unit.name]
        return TaskRunner(EvaluatedModel(name="m", folder=str(folder)), report).run(
            unit.name, loaded, limit
        )


def test_choices_are_compared_by_their_log_probability(
    saved_teacher: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = quiz()
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in rows:
        answers = [f" {answer}" for answer in row["answers"]]
        sums = np.array(
            [logprob(model, tokenizer, row["question"], a, VOCABULARY) for a in answers]
        )
        lengths = np.array([len(answer) for answer in row["answers"]])
        right["acc"].append(sums.argmax() == row["right"])
        right["acc_norm"].append((sums / lengths).argmax() == row["right"])
    assert right["acc"] != right["acc_norm"]
    path = write_task(tmp_path / "all", "quiz", QUIZ, rows)
    (result,) = results(saved_teacher, path)
    assert (result.main, result.examples, result.few_shot) == ("acc", len(rows), 0)
    for name, hits in right.items():
        score = result.metrics[name]
        assert score.value == pytest.approx(np.mean(hits))
        assert score.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
        assert score.higher_is_better
    # a limit takes the first examples
    (first,) = results(saved_teacher, path, limit=4)
    assert (first,) == tuple(results(saved_teacher, write_task(tmp_path, "quiz", QUIZ, rows[:4])))
    assert first.examples == 4


def test_padding_rows_do_not_count_in_the_loss_of_texts(
    saved_teacher: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = [{"text": row["question"]} for row in quiz(9)]

    def bits(size: int) -> float:
        total = sum(logprob(model, tokenizer, "", row["text"], size) for row in rows)
        return -total / sum(len(row["text"].encode()) for row in rows) / math.log(2)

    (result,) = results(saved_teacher, write_task(tmp_path, "prose", PROSE, rows))
    assert result.metrics["bits_per_byte"].value == pytest.approx(bits(VOCABULARY), rel=1e-5)
    assert bits(VOCABULARY + 16) > 1.01 * bits(VOCABULARY)


def test_the_standard_error_of_a_perplexity_is_bootstrapped(
    saved_teacher: Path, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    rows = quiz(12)
    pairs = [(row["question"], f" {row['answers'][0]}") for row in rows]
    sums = np.array([logprob(model, tokenizer, *pair, VOCABULARY) for pair in pairs])
    (result,) = results(saved_teacher, write_task(tmp_path, "last", LAST, rows))
    score = result.metrics["perplexity"]
    assert score.value == pytest.approx(np.exp(-sums.mean()), rel=1e-5)
    draws = np.random.default_rng(0).choice(sums, (20000, len(sums)))
    assert score.stderr == pytest.approx(np.exp(-draws.mean(1)).std(), rel=0.15)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_generated_text_has_no_padding_tokens(family: str, tokenizer: Any, tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "model", tokenizer, family)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [{"question": row["question"]} for row in quiz(8)]
    for i, row in enumerate(rows):
        text = written(model, tokenizer, row["question"], 6, VOCABULARY)
        row["answer"] = f"not {text}" if i % 4 == 3 else text
    assert len({row["answer"] for row in rows}) > 2
    (result,) = results(folder, write_task(tmp_path, "write", WRITE, rows))
    assert result.metrics["exact_match"].value == pytest.approx(0.75)


def test_requests_are_reported_on_stderr_and_nothing_else_is_printed(
    saved_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger("lm_eval")
    before = (logger.handlers, logger.propagate, dict(os.environ))
    reports: list[Report] = []

    def report(one: Report) -> None:
        reports.append(one)
        print(one.doing or one.done, file=sys.stderr)

    results(saved_teacher, write_task(tmp_path, "quiz", QUIZ, quiz(4)), report=report)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["load the model", *map(str, range(13))]
    counted = [r for r in reports if not r.doing]
    assert {(r.stage, r.unit) for r in counted} == {("evaluate m quiz", "requests")}
    assert {r.total for r in counted[1:]} == {12}
    assert (logger.handlers, logger.propagate, dict(os.environ)) == before


@pytest.mark.parametrize(("task", "cut"), [(QUIZ, 3), (PROSE, 0), (WRITE, 1)])
def test_requests_that_are_cut_to_the_context_are_counted(
    saved_teacher: Path, tmp_path: Path, task: dict[str, Any], cut: int
) -> None:
    texts = ("short", "the teacher speaks " * 60)
    rows = [
        {**row, "question": text, "text": text, "answer": "x"}
        for row, text in zip(quiz(2), texts, strict=True)
    ]
    reports: list[Report] = []
    results(saved_teacher, write_task(tmp_path, "long", task, rows), report=reports.append)
    expected = (
        f"{cut} requests are longer than the model's context of 128 tokens and lost their beginning"
    )
    # long texts are read in windows, without a cut
    assert [r.note for r in reports if r.note] == ([expected] if cut else [])


def refusal(folder: Path, path: Path) -> str:
    with pytest.raises(ColdstillError) as caught:
        results(folder, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_hub_is_off_only_during_a_run() -> None:
    import datasets
    import huggingface_hub

    def states() -> list[Any]:
        variable = os.environ.get("HF_DATASETS_OFFLINE")
        return [huggingface_hub.is_offline_mode(), datasets.config.HF_HUB_OFFLINE, variable]

    before = states()
    with offline():
        assert states() == [True, True, "1"]
    assert states() == before == [False, False, None]


def test_tasks_that_cannot_run_are_refused_in_one_line(saved_teacher: Path, tmp_path: Path) -> None:
    def of(name: str, **changes: Any) -> str:
        return refusal(saved_teacher, write_task(tmp_path, name, {**QUIZ, **changes}, quiz(1)))

    def metric(**entry: Any) -> str:
        return of("quiz", metric_list=[entry])

    where = f"{tmp_path / 'quiz.yaml'}: task 'quiz': "
    unknown = "no metric 'accc' in lm-eval; --download searches the hub too"
    assert metric(metric="accc") == where + unknown
    aggregated = metric(metric="acc", aggregation="mode")
    assert aggregated == f"{where}no aggregation 'mode' in lm-eval"
    assert "task 'code': its 'unsafe_code' would execute" in of("code", unsafe_code=True)
    assert "task 'photo': has images" in of("photo", doc_to_image=["question"])
    assert of("quiz", doc_to_text="{{q | nope}}").endswith("No filter named 'nope'.")

    path = write_task(tmp_path, "broken", QUIZ, quiz(1))
    path.with_suffix(".jsonl").write_text('{"a": 1\n{', encoding="utf-8")
    assert f"{path}: task 'broken': ArrowInvalid: JSON parse error" in refusal(saved_teacher, path)
    rows = [{**row, "answers": ["the teacher " * 99] * 3} for row in quiz(1)]
    failed = refusal(saved_teacher, write_task(tmp_path, "long", QUIZ, rows))
    assert failed.startswith("evaluate m: task 'long': lm-eval failed: ValueError: an answer of")
    prose = {**PROSE, "metric_list": [{"metric": "word_perplexity"}]}
    path = write_task(tmp_path, "word", prose, [{"text": "teacher" * 300}])
    line = refusal(saved_teacher, path)
    assert "perplexity is too large for a float; list only bits_per_byte" in line
