"""A remote server as the teacher: the OpenAI-compatible interface of vLLM.

A server sends neither states nor samples. Asked for `prompt_logprobs`, it lists the most probable
tokens at every position of a text, and the token that follows. So its record has a head with the
exact mass outside it, the label's log-probability, and no samples.
"""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ....data.errors import ColdstillError
from ....data.store.caveats import SERVER
from .http_client import Http

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from ...config import ServerOptions
    from .engine import Asked

NAME = SERVER
_CHUNK = 512
"""Tokens that are decoded by one request."""
_NOTHING = -9000.0
"""Log-probabilities from here on stand for a probability of 0, which JSON cannot say otherwise."""
_MOST_BIASES = 300
"""Most tokens that a server can leave out of an answer."""
SAME = 0.25
"""Root mean square of the differences of label log-probabilities, in nats, up to which two answers
are of one model. Half precision in other batches differs by about 0.02."""
_TOO_MUCH = 1e-3
"""Most by which the probabilities of a head may exceed 1 in the server's arithmetic."""
_POLL = 0.5
"""Seconds between two looks at whether answers are still wanted."""
_TEXTS = (
    "In 1987 the price rose by 3,408.5 % (see p. 12).",
    "def area(r):\n    return 3.14159 * r ** 2  # πr²\n",
    "Ça coûte 20 €, naïve façade; Straße, smörgåsbord.",
    "Привет, мир! 你好。こんにちは 안녕하세요 مرحبا नमस्ते",
    "tabs\t\tand   spaces\n\n\nlines 🙂👩‍🚀",
)
"""Texts on which the two tokenizers must agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server says of the model that it serves."""

    name: str
    version: str
    """Name and version of the server."""
    longest: int | None = None
    """Most tokens of a text with its answer; None if it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Listed:
    """What a server says of some positions of a text."""

    ids: NDArray[np.int32]
    """[M, K] the most probable tokens, the most probable first."""
    logprobs: NDArray[np.float32]
    """[M, K]."""
    label: NDArray[np.float32]
    """[M] the log-probability of the token that follows."""


class Server:
    """A server with a model. Any thread may call the methods."""

    def __init__(
        self,
        url: str,
        options: ServerOptions,
        vocabulary: int,
        note: Callable[[str], None],
        rows: int = 0,
    ) -> None:
        """Ask the server what it serves.

        vocabulary  V, the tokens of the teacher's tokenizer
        note        called with a warning
        rows        rows of the model's head; those beyond V are padding

        Raises
            ColdstillError: there is no such server, or it does not serve the model
        """
        self._root = url.rstrip("/").removesuffix("/v1")
        self._vocabulary = vocabulary
        self._rows = max(rows, vocabulary)
        padding = range(vocabulary, self._rows)
        few = len(padding) <= _MOST_BIASES
        self._unused = {str(token): -100 for token in padding} if few else {}
        self._http = Http(self._root, options.timeout, note)
        self._lock = threading.Lock()
        self._probe: tuple[list[int], NDArray[np.int64], int, NDArray[np.float32]] | None = None
        self._pool = ThreadPoolExecutor(options.requests, "coldstill server")
        self.served = self._find(options.model)

    def close(self) -> None:
        """End all requests."""
        self._http.abort(None)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._http.report()

    def _find(self, name: str) -> Served:
        with self._http.parsing("/v1/models"):
            models = self._ask("/v1/models")["data"]
            names = [str(model["id"]) for model in models]
        if not names:
            raise ColdstillError(f"{self._root}: it serves no model")
        if not name and len(models) != 1:
            raise ColdstillError(
                f"{self._root}: it serves {len(models)} models ({', '.join(names)}); name one in "
                "teacher.engine_options, as model"
            )
        if name and name not in names:
            raise ColdstillError(
                f"{self._root}: it serves {', '.join(names)}, and not {name!r}; correct model in "
                "teacher.engine_options"
            )
        found = models[names.index(name)] if name else models[0]
        longest = found.get("max_model_len")
        return Served(
            name=str(found["id"]),
            version=self._version(str(found.get("owned_by", ""))),
            longest=None if longest is None else int(longest),
        )

    def _version(self, owner: str) -> str:
        """Its program and version; vLLM tells them, others may have no such address."""
        try:
            return f"{owner} {self._ask('/version')['version']}".strip()
        except (ColdstillError, LookupError):
            return owner

    def expect_tokenizer(self, tokenizer: Any) -> None:
        """Compare a tokenizer with the server's: the text of every token, and the tokens of texts
        with numbers, code and several scripts.

        Raises
            ColdstillError: they differ, or the server does not say
        """
        size = self._vocabulary
        chunks = [list(range(at, min(at + _CHUNK, size))) for at in range(0, size, _CHUNK)]
        # a letter between two tokens shows where each ends
        between = tokenizer("a", add_special_tokens=False)["input_ids"]
        apart = [[part for token in chunk for part in (token, *between)] for chunk in chunks]
        for chunk, tokens, text in zip(
            chunks, apart, self._pool.map(self._text_of, apart), strict=True
        ):
            if text != tokenizer.decode(tokens):
                raise self._other_token(tokenizer, chunk)
        for text in _TEXTS:
            body = {"model": self.served.name, "prompt": text, "add_special_tokens": False}
            with self._http.parsing("/tokenize"):
                theirs = self._ask("/tokenize", body)["tokens"]
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs != ours:
                at = next(
                    (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
                    min(len(ours), len(theirs)),
                )
                raise ColdstillError(
                    f"{self._root}: its tokenizer is not that of teacher.model: of {text!r}, token "
                    f"{at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here"
                )

    def _text_of(self, tokens: list[int]) -> str:
        body = {"model": self.served.name, "tokens": tokens}
        with self._http.parsing("/detokenize"):
            return str(self._ask("/detokenize", body)["prompt"])

    def _other_token(self, tokenizer: Any, chunk: list[int]) -> ColdstillError:
        while len(chunk) > 1:  # decoding a token may need those before it: then the last half
            half = chunk[: len(chunk) // 2]
            same = self._text_of(half) == tokenizer.decode(half)
            chunk = chunk[len(half) :] if same else half
        return ColdstillError(
            f"{self._root}: its tokenizer is not that of teacher.model: token {chunk[0]} is "
            f"{self._text_of(chunk)!r} there and {tokenizer.decode(chunk)!r} here"
        )

    def submit(
        self, documents: Sequence[list[int]], places: Sequence[NDArray[np.int64]], count: int
    ) -> list[Future[Listed]]:
        """Queue documents, each with its label tokens. The results raise ColdstillError if the
        server fails.

        places  for each document, [M] the positions that are asked for
        count   K, how many tokens are listed at each
        """
        return [
            self._pool.submit(self._guarded, self._remembered, document, own, count)
            for document, own in zip(documents, places, strict=True)
        ]

    def _guarded(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call; after an error all other requests fail with it, too."""
        try:
            return call(*arguments)
        except BaseException as error:
            self._http.abort(error)
            raise

    def _remembered(self, document: list[int], places: NDArray[np.int64], count: int) -> Listed:
        found = self.listed(document, places, count)
        with self._lock:
            if self._probe is None and len(places):
                self._probe = (document, places, count, found.label)
        return found

    def expect_same_model(self) -> None:
        """Raise ColdstillError if the server now says something else of the first document that it
        was asked: it serves another model."""
        if self._probe is None:
            return
        document, places, count, label_M = self._probe
        difference = self.listed(document, places, count).label - label_M
        if not (rms := root_mean_square(difference)) <= SAME:
            raise ColdstillError(
                f"{self._root}: it now has another model than before: log-probabilities of the "
                f"first document differ by {rms:.2g} nats; shards since then may be wrong: delete "
                "the store, or serve that model again under another name of the run"
            )

    def listed(self, document: list[int], places: NDArray[np.int64], count: int) -> Listed:
        """The distributions at some positions of a document, whose next tokens it contains."""
        answer = self._complete(document, max_tokens=1, temperature=0.0, prompt_logprobs=count)
        at = answer.get("prompt_logprobs")
        if not isinstance(at, list) or len(at) != len(document):
            raise ColdstillError(
                f"{self._root}: it gives no prompt_logprobs for {len(document)} tokens; use a "
                "server of vLLM, or another engine"
            )
        ids_MK = np.zeros((len(places), count), np.int32)
        logp_MK = np.zeros((len(places), count), np.float32)
        label_M = np.zeros(len(places), np.float32)
        with self._http.parsing("/v1/completions"):
            if not all(str(token) in own for token, own in zip(document[1:], at[1:], strict=True)):
                raise ColdstillError(f"{self._root}: its answer is about other tokens than asked")
            for row, place in enumerate(places.tolist()):
                entries = {
                    int(token): float(entry["logprob"]) for token, entry in at[place + 1].items()
                }
                best = sorted(entries.items(), key=lambda pair: (-pair[1], pair[0]))[:count]
                if len(best) < count:
                    raise ColdstillError(
                        f"{self._root}: it lists {len(best)} tokens at a position, and not "
                        f"{count}; lower logits.head and evaluation.head, or start it with a "
                        "larger --max-logprobs"
                    )
                ids_MK[row], logp_MK[row] = zip(*best, strict=True)
                label_M[row] = entries[document[place + 1]]
        self._expect_possible(ids_MK, logp_MK, label_M)
        return Listed(ids=ids_MK, logprobs=logp_MK, label=label_M)

    def _expect_possible(
        self,
        ids_MK: NDArray[np.int32],
        logp_MK: NDArray[np.float32],
        label_M: NDArray[np.float32],
    ) -> None:
        """Raise ColdstillError for numbers that are not the head of a distribution."""
        if ids_MK.max(initial=0) >= self._vocabulary:
            raise ColdstillError(
                f"{self._root}: it lists the token {ids_MK.max()}, and the tokenizer of "
                f"teacher.model has {self._vocabulary:,} tokens; the probability of padding cannot "
                "be taken out again: use another engine"
            )
        if not ((logp_MK > _NOTHING).all() and (label_M > _NOTHING).all()):  # NaN too
            raise ColdstillError(
                f"{self._root}: it lists a token of probability 0, or one that is not a number, "
                "which no record holds; start it with --dtype float32 or without a filter of tokens"
            )
        mass_M = np.exp(logp_MK.astype(np.float64)).sum(1)
        # no other token is likelier than the last one that is listed
        most_M = (self._rows - logp_MK.shape[1]) * np.exp(logp_MK[:, -1].astype(np.float64))
        if not ((mass_M <= 1.0 + _TOO_MUCH) & (mass_M + most_M >= 1.0 - _TOO_MUCH)).all():
            raise ColdstillError(
                f"{self._root}: the probabilities of {ids_MK.shape[1]} tokens sum to "
                f"{mass_M.min():.3g} to {mass_M.max():.4g}: this is not the head of a "
                "distribution; start it with --logprobs-mode raw_logprobs"
            )

    def answers(
        self, prompts: Sequence[list[int]], room: Sequence[int], asked: Asked
    ) -> list[list[int]]:
        """As `Engine.answers`."""
        waiting = [
            self._pool.submit(self._guarded, self._answer, prompt, most, seed, asked)
            for prompt, most, seed in zip(prompts, room, asked.seeds, strict=True)
        ]
        left = set(waiting)
        while left:
            done, left = wait(left, _POLL, FIRST_EXCEPTION)
            if any(each.exception() for each in done):
                break
            if asked.stop():  # all are dropped by the caller, and an answer has a token
                self._http.abort(None)
                return [prompt[-1:] for prompt in prompts]
        return [each.result() for each in waiting]

    def _answer(self, prompt: list[int], most: int, seed: int, asked: Asked) -> list[int]:
        config = asked.config
        answer = self._complete(
            prompt,
            max_tokens=most,
            temperature=config.temperature,
            top_k=config.top_k or -1,
            top_p=config.top_p,
            seed=seed,
            stop_token_ids=sorted(asked.ends),
            ignore_eos=True,  # the ends are given
            # without these a server takes the model's own settings
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            min_p=0.0,
            logit_bias=self._unused,
            return_token_ids=True,
        )
        tokens = answer.get("token_ids")
        if not tokens:
            raise ColdstillError(
                f"{self._root}: it does not return the tokens of an answer, as vLLM does from "
                "0.10.2 on"
            )
        if max(tokens) >= self._vocabulary:
            raise ColdstillError(
                f"{self._root}: it answered with the token {max(tokens)}, which the tokenizer of "
                "teacher.model does not have; use another engine"
            )
        if len(tokens) < most and tokens[-1] not in asked.ends:
            raise ColdstillError(
                f"{self._root}: an answer of {len(tokens)} tokens has no end, and {most} were "
                "asked for; it adds tokens to stop at, which an answer must not have"
            )
        return [int(token) for token in tokens]

    def _complete(self, prompt: list[int], **settings: Any) -> dict[str, Any]:
        body = {"model": self.served.name, "prompt": prompt, **settings}
        with self._http.parsing("/v1/completions"):
            answer: dict[str, Any] = dict(self._ask("/v1/completions", body)["choices"][0])
        return answer

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """As `Http.ask`. A server that was away may have come back with another model."""
        answer, repeated = self._http.ask(path, body)
        if repeated and body is not None:
            self.expect_same_model()
        return answer


def root_mean_square(values: NDArray[Any]) -> float:
    """Of any number of values; 0 if there are none."""
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())) if values.size else 0.0
