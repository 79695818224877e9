"""A model takes tasks in lm-eval."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....data.errors import ColdstillError
from ...models.device import best_device
from ...models.loading import load_model, load_tokenizer
from ...models.rotary import scale_by_document
from ...models.vocabulary import without_rowless
from ...report import Report, Reporter, silent
from .loading import first_line
from .quiet import environment, hushed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STAGE = "evaluate"
_RESAMPLES = 1000
"""Of the examples, for the standard error of what is no mean: 3% of it. Of lm-eval's own 100,000
some take minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessModel:
    """Where a model is, and how it is loaded."""

    name: str
    folder: str
    precision: str = "fp32"
    attention: str | None = None
    own_code: bool = False
    """Whether code that lies beside its weights may run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of a task. What is no finite number is None."""

    value: float | None
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What a model got in a task, or in all tasks of a group together."""

    task: str
    metrics: dict[str, Score]
    """By name; behind a filter other than lm-eval's plain one as `name,filter`."""
    main: str | None
    """The first one that its file lists; None for a group that adds nothing up."""
    examples: int
    few_shot: int
    version: str | None
    """As its file states it."""


class Examinee:
    """A loaded model, ready for tasks."""

    def __init__(self, model: HarnessModel, report: Reporter = silent) -> None:
        """Load it, and its tokenizer from its own folder, onto this process's device.

        Raises
            ColdstillError: it cannot be loaded, or its tokenizer cannot begin a text
        """
        from .model import StudentLM

        self._name, self._task = model.name, ""
        screen = sys.stderr

        def aloud(said: Report) -> None:
            with contextlib.redirect_stderr(screen):
                report(said)

        self._report = aloud
        where = f"{STAGE} {model.name}"
        aloud(Report(stage=where, doing="load the model"))
        tokenizer = load_tokenizer(model.folder, where, own_code=model.own_code)
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ColdstillError(
                f"{where}: its tokenizer has no token that begins or ends a text; lm-eval puts one "
                "before what stands alone"
            )
        loaded = load_model(
            model.folder,
            where,
            precision=model.precision,
            attention=model.attention,
            own_code=model.own_code,
        )
        scale_by_document(loaded)  # lm-eval batches texts of many lengths
        rows = loaded.get_output_embeddings().weight.shape[0]
        tokenizer = without_rowless(tokenizer, rows, where)
        with hushed():
            self._lm = StudentLM(loaded.to(best_device()), tokenizer, self._answered)

    def _answered(self, done: int, total: int) -> None:
        stage = f"{STAGE} {self._name} {self._task}"
        self._report(Report(stage=stage, done=done, total=total, unit="requests"))

    def take(self, name: str, loaded: Mapping[str, Any], limit: int | None) -> list[TaskResult]:
        """Its results in a loaded task, or in a group and all that it holds, the group first.

        limit  only so many examples of each task, from the first on

        Raises
            ColdstillError: lm-eval cannot bring the task to an end with this model
        """
        from lm_eval.evaluator import evaluate

        self._task = name
        stage = f"{STAGE} {self._name} {name}"
        self._report(Report(stage=stage, unit="requests"))
        self._lm.begin()
        _seed(loaded["tasks"].values())
        # resampling in processes would copy this one, threads of torch and all
        with hushed() as warned, environment(DISABLE_MULTIPROC="1"):
            try:
                found = evaluate(
                    lm=self._lm,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=_RESAMPLES,
                    log_samples=False,
                )
            except Exception as error:  # of lm-eval, of a metric, of a task's own code
                raise self._unfinished(error) from error
        for text in warned:
            if "runcat" not in text:  # one for each request; they are counted instead
                self._warn(text)
        if self.cut:
            self._warn(
                f"{self.cut} requests are longer than the model's context of "
                f"{self._lm.max_length} tokens and lost their beginning"
            )
        groups = loaded["groups"]
        return [_result(n, found, groups.get(n)) for n in (*groups, *loaded["tasks"])]

    def _unfinished(self, error: Exception) -> ColdstillError:
        where = f"{STAGE} {self._name}: task '{self._task}'"
        if isinstance(error, OverflowError):
            return ColdstillError(
                f"{where}: a perplexity is too large for a number; ask for bits_per_byte alone in "
                "its metric_list"
            )
        return ColdstillError(f"{where}: lm-eval cannot finish it: {first_line(error)}")

    @property
    def cut(self) -> int:
        """How many requests of the last task did not fit into the model's context."""
        return int(self._lm.cut)

    def _warn(self, text: str) -> None:
        stage = f"{STAGE} {self._name} {self._task}"
        self._report(Report(stage=stage, note=text, warning=True))


def _seed(tasks: Iterable[Any]) -> None:
    """Begin as lm-eval's own command does, so that its figures and ours are the same."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks:
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _result(name: str, found: Mapping[str, Any], group: Any) -> TaskResult:
    figures = found["results"][name]
    better = found["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in figures.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics[metric if kind == "none" else key] = Score(
                value=_number(value),
                stderr=_number(figures.get(f"{metric}_stderr,{kind}")),
                higher_is_better=better.get(metric),
            )
    if group is None:
        listed = [m.get("metric") for m in found["configs"][name].get("metric_list") or ()]
    else:
        listed = [m.metric for m in group.aggregate_metric_list or ()]
    version = found["versions"].get(name)
    firsts = [key for key in metrics if listed and key.partition(",")[0] == listed[0]]
    return TaskResult(
        task=name,
        metrics=metrics,
        main=next(iter([*firsts, *metrics]), None),
        examples=int(figures.get("sample_len", 0)),
        few_shot=int(found["n-shot"].get(name) or 0),
        version=None if version in (None, "Yaml", "N/A") else str(version),  # lm-eval's "none"
    )


def _number(value: Any) -> float | None:
    """A figure that JSON can hold; lm-eval says "N/A" where it has none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
