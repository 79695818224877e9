"""Runs loaded tasks on a model in lm-eval. Import it only where lm-eval is installed."""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import patch_environment
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from ....data.errors import ColdstillError
from ...models.device import best_device
from ...models.loading import load_model, load_tokenizer
from ...models.rotary import scale_by_document
from ...models.vocabulary import vocabulary_size, without_padding, without_rowless
from ...report import Report, Reporter, silent
from .loading import class_and_line, quiet
from .results import TaskResult, task_result

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_LOGITS = 1 << 28
"""Most logits of one batch: 1 GiB in fp32, and as much for their log-probabilities."""
_USUAL_LENGTH = 1024
"""Tokens per row that a batch is sized for: the context may be far longer than any request."""
_LARGEST_BATCH = 32


class CountingLM(HFLM):  # type: ignore[misc]
    """`HFLM` that counts requests: those answered, for progress, and those cut to the context."""

    def __init__(
        self, model: Any, tokenizer: Any, vocabulary: int, answered: Callable[[int, int], None]
    ) -> None:
        """Wrap a loaded model, which stays on its device.

        answered  is called with the number of answered requests and of all requests
        """
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", softmax_dtype="float32"
        )
        fitting = _LOGITS // (min(self.max_length, _USUAL_LENGTH) * vocabulary)
        self.batch_size_per_gpu = max(1, min(_LARGEST_BATCH, fitting))
        self.cut = 0
        """Requests that exceeded the context and lost their first tokens."""
        self._counter = _Counter(answered)
        self.set_cache_hook(self._counter)

    def reset(self) -> None:
        self.cut = self._counter.done = self._counter.total = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self._counter.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self._counter.total += len(requests)
        found: list[float] = []
        # one call per batch, because lm-eval returns answers only at the end of a call
        for start in range(0, len(requests), self.batch_size):
            batch = requests[start : start + self.batch_size]
            found += super().loglikelihood_rolling(batch, disable_tqdm)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self._counter.total += len(requests)
        return super().generate_until(requests, disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> Any:
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > self.max_length:  # a bare assertion in lm-eval
            raise ValueError(
                f"an answer of {longest} tokens is longer than the model's context of "
                f"{self.max_length}"
            )
        room = self.max_length + 1  # the last token is predicted and not an input
        self.cut += sum(len(before) + len(after) > room for _, before, after in requests)
        return super()._loglikelihood_tokens(requests, *args, **options)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        if left_truncate_len:
            self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)


class _Counter(CacheHook):  # type: ignore[misc]
    """Counts answers. lm-eval hands each one to its cache hook at once."""

    def __init__(self, answered: Callable[[int, int], None]) -> None:
        super().__init__(None)
        self._answered = answered
        self.done = self.total = 0

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        self.done += 1
        self._answered(self.done, self.total)


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
            except Exception as error:  # lm-eval, metrics and a task's code raise any class
                raise ColdstillError(
                    f"{self._stage}: task '{name}': lm-eval failed: {class_and_line(error)}"
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
