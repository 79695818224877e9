"""Runs loaded tasks on a model in lm-eval."""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import patch_environment

from ....data.errors import ColdstillError
from ...models.device import best_device
from ...models.loading import load_model, load_tokenizer
from ...models.rotary import scale_by_document
from ...models.vocabulary import vocabulary_size, without_padding, without_rowless
from ...report import Report, Reporter, silent
from .loading import first_line
from .quiet import quiet
from .results import TaskResult, task_result

if TYPE_CHECKING:
    from collections.abc import Mapping

_RESAMPLES = 1000
"""Bootstrap resamples for standard errors of metrics that are not means. The error itself is then
known to 3%. lm-eval's default of 100,000 takes minutes for some metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """Where a model is, and how to load it."""

    name: str
    folder: str
    precision: str = "fp32"
    attention: str | None = None
    own_code: bool = False
    """Run the Python code in the model's folder (`trust_remote_code`)."""


class TaskRunner:
    """A loaded model that runs tasks, one after the other."""

    def __init__(self, model: EvaluatedModel, report: Reporter = silent) -> None:
        """Load the model and its tokenizer onto this process's device.

        Raises
            ColdstillError: the model cannot be loaded, or its tokenizer has neither a beginning nor
                an end of text
        """
        from .model import CountingLM

        screen = sys.stderr

        def visible(one: Report) -> None:  # also while the libraries are quiet
            with contextlib.redirect_stderr(screen):
                report(one)

        self._send, self._stage = visible, f"evaluate {model.name}"
        visible(Report(stage=self._stage, doing="load the model"))
        tokenizer = load_tokenizer(model.folder, self._stage, own_code=model.own_code)
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ColdstillError(
                f"{self._stage}: its tokenizer has no beginning-of-text and no end-of-text token; "
                "lm-eval puts one of them before a text without a prompt"
            )
        loaded = load_model(
            model.folder,
            self._stage,
            precision=model.precision,
            attention=model.attention,
            own_code=model.own_code,
        )
        scale_by_document(loaded)  # lm-eval batches texts of many lengths
        rows = loaded.get_output_embeddings().weight.shape[0]
        tokenizer = without_rowless(tokenizer, rows, self._stage)
        vocabulary = vocabulary_size(tokenizer)
        # padding rows are not trained, so their logits are arbitrary
        loaded = without_padding(loaded, vocabulary).to(best_device())
        with quiet():
            self._lm = CountingLM(loaded, tokenizer, vocabulary, self._answered)
        self._report = Report(stage=self._stage, unit="requests")

    @property
    def cut(self) -> int:
        """Requests of the last task that were longer than the model's context."""
        return int(self._lm.cut)

    def run(self, name: str, loaded: Mapping[str, Any], limit: int | None) -> list[TaskResult]:
        """Results of a task, or of a group and then of each task in it.

        loaded  lm-eval's `TaskDict` of the task or group
        limit   number of examples of each task, the first ones; None for all

        Raises
            ColdstillError: lm-eval fails on this task with this model
        """
        from lm_eval.evaluator import evaluate

        self._report = Report(stage=f"{self._stage} {name}", unit="requests")
        self._send(self._report)
        self._lm.reset()
        _seed(loaded["tasks"])
        # bootstrapping in processes would fork this one with its torch threads
        with quiet() as warnings, patch_environment(DISABLE_MULTIPROC="1"):
            try:
                found = evaluate(
                    lm=self._lm,
                    task_dict=loaded,
                    limit=limit,
                    bootstrap_iters=_RESAMPLES,
                    log_samples=False,
                )
            except OverflowError as error:
                raise ColdstillError(
                    f"{self._stage}: task '{name}': a perplexity is too large for a float; list "
                    "only bits_per_byte in its metric_list"
                ) from error
            except Exception as error:  # of lm-eval, of a metric, of a task's own code
                raise ColdstillError(
                    f"{self._stage}: task '{name}': lm-eval failed: {first_line(error)}"
                ) from error
        # lm-eval warns once for each truncated request; this warns once with their number
        warnings = [text for text in warnings if "runcat" not in text]
        if self.cut:
            warnings.append(
                f"{self.cut} requests are longer than the model's context of "
                f"{self._lm.max_length} tokens and lost their beginning"
            )
        for text in warnings:
            self._send(replace(self._report, note=text, warning=True))
        groups = loaded["groups"]
        return [task_result(n, found, groups.get(n)) for n in (*groups, *loaded["tasks"])]

    def _answered(self, done: int, total: int) -> None:
        self._send(replace(self._report, done=done, total=total))


def _seed(tasks: Mapping[str, Any]) -> None:
    """Set seeds and few-shot defaults as lm-eval's `simple_evaluate`, for the same figures.

    `simple_evaluate` itself also collects details of the machine with external programs.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
