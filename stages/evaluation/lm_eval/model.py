"""A student as lm-eval sees it. Imported only where lm-eval is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from ...models.vocabulary import vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

_LOGITS = 1 << 28
"""Most logits of one batch: a gibibyte, and another for their logarithms."""
_LONGEST_USUAL = 1024
"""What a batch is sized for, in tokens: a model may have room for far more than tasks ask of it."""
_LARGEST_BATCH = 32


class StudentLM(HFLM):  # type: ignore[misc]
    """`HFLM` with our model and our reports in place of its bars.

    Rows of the logits past the tokenizer's real size are left out, as everywhere here: no student
    is trained on them, so they may hold anything.
    """

    def __init__(self, model: Any, tokenizer: Any, answered: Callable[[int, int], None]) -> None:
        """Take a loaded model where it is; `answered` hears how many requests of how many."""
        self._vocabulary = vocabulary_size(tokenizer)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", softmax_dtype="float32"
        )
        length = min(self.max_length, _LONGEST_USUAL)
        fitting = _LOGITS // (length * self._vocabulary)
        self.batch_size_per_gpu = max(1, min(_LARGEST_BATCH, fitting))
        self.cut = 0
        """How many requests did not fit into the context and lost their beginning."""
        self._count = _Count(answered)
        self.set_cache_hook(self._count)

    def begin(self) -> None:
        """Count from nothing again: another task follows."""
        self.cut = 0
        self._count.done = self._count.total = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """The log-probability of each continuation, and whether it is the greedy one."""
        self._count.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """The log-probability of each whole text; some at a time, since nothing is told between."""
        self._count.total += len(requests)
        found: list[float] = []
        for start in range(0, len(requests), self.batch_size):
            some = requests[start : start + self.batch_size]
            found += super().loglikelihood_rolling(some, disable_tqdm=True)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        """What the model writes after each prompt."""
        self._count.total += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        longest = max((len(after) for _, _, after in requests), default=0)
        if longest > self.max_length:  # a bare assertion of lm-eval's otherwise
            raise ValueError(
                f"an answer of {longest} tokens is longer than the model's context of "
                f"{self.max_length}"
            )
        room = self.max_length + 1  # the last token is only predicted
        self.cut += sum(len(before) + len(after) > room for _, before, after in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> Any:
        """The ids of prompts, padded on the left; what does not fit loses its beginning."""
        if left_truncate_len:
            self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)

    def _model_call(self, inps: torch.Tensor, **inputs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, **inputs)[..., : self._vocabulary]
        return logits

    def _model_generate(
        self, context: Any, max_length: int, stop: list[str], **settings: Any
    ) -> Any:
        rows = self.model.get_output_embeddings().weight.shape[0]
        if rows > self._vocabulary:
            settings["suppress_tokens"] = list(range(self._vocabulary, rows))
        return super()._model_generate(context, max_length, stop, **settings)


class _Count(CacheHook):  # type: ignore[misc]
    """Where lm-eval hands in every answer as soon as it has it, for a cache that nobody keeps."""

    def __init__(self, answered: Callable[[int, int], None]) -> None:
        super().__init__(None)
        self._answered = answered
        self.done = self.total = 0

    def add_partial(self, attr: str, req: Iterable[Any], res: Any) -> None:
        self.done += 1
        self._answered(self.done, self.total)
