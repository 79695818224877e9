"""The model class that lm-eval runs. Import it only where lm-eval is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

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
        """Set all counts to 0, before a new task."""
        self.cut = self._counter.done = self._counter.total = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self._counter.total += len(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self._counter.total += len(requests)
        found: list[float] = []
        # in batches: lm-eval hands in the answers only at the end of a call
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
