"""A teacher behind a server, which lists the most probable tokens of a text's positions.

`capture.shards` uses it as it uses a teacher in this process. A batch is a number of requests, of
which the next batches' are sent while the server still works on the first. The results become
targets on the thread that writes the shard.
"""

from __future__ import annotations

from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...data.alignment import labels
from ...data.errors import ColdstillError, StoppedError
from ...data.files import json_sha256
from ...data.given_targets import given_targets
from ...data.store.manifest import EngineIdentity, TeacherIdentity
from ..models.engines.engine import wanted_documents
from ..models.engines.server import NAME, SAME, Server, root_mean_square
from ..models.loading import settings_of_model
from ..report import Report, Reporter, silent
from .generate import answer_by_engine, end_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from ...data.schema import Capture, Sequences, Targets
    from ...data.store.reader import StoreReader
    from ..config import ServerOptions
    from ..models.engines.server import Listed, Served
    from ..models.inputs import Isolation
    from .plan import CapturePlan

_GRACE = 10.0
"""Seconds that a batch may still take after the capture is to stop."""
_POLL = 0.5
_COMPARED = 4
"""Sequences of a store that are asked again before it is continued."""


@dataclass(frozen=True, slots=True, eq=False)
class PendingAnswers:
    """Targets that the server may still be computing."""

    sequences: Sequences
    waiting: list[Future[Listed]]
    capture: Capture
    vocabulary: int
    stop: Callable[[], bool]

    def targets(self) -> Targets:
        """Wait for the targets.

        Raises
            ColdstillError: the server fails
            StoppedError: the capture is to stop, and the server does not answer soon
        """
        count, left, late = self.capture.head, set(self.waiting), 0.0
        while left:
            _, left = wait(left, _POLL, FIRST_EXCEPTION)
            late = late + _POLL if self.stop() else 0.0
            if late > _GRACE or any(e.done() and e.exception() for e in self.waiting):
                break
        if left and late > _GRACE:
            raise StoppedError
        found = [each.result() for each in self.waiting]
        fields = {
            "head_ids": np.concatenate([np.zeros((0, count), np.int32)] + [f.ids for f in found]),
            "head_logprobs": np.concatenate(
                [np.zeros((0, count), np.float32)] + [f.logprobs for f in found]
            ),
            "label_logprob": np.concatenate([np.zeros(0, np.float32)] + [f.label for f in found]),
        }
        return given_targets(
            "server", fields, labels(self.sequences), self.capture, self.vocabulary
        )


class ServedForward:
    """Captures batches through a server, as `Forward` describes it."""

    pin = False

    def __init__(
        self,
        teacher: ServedTeacher,
        capture: Capture,
        budget: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._server, self._vocabulary = teacher.server, teacher.vocabulary
        self._capture, self._stop = capture, stop
        # three batches are begun while one is waited for: together they keep all requests busy
        self.budget = max(budget, teacher.enough_tokens)

    def prepare(self, sequences: Sequences) -> PendingAnswers:
        """Queue the requests of a batch; any thread may call this."""
        documents, places = wanted_documents(sequences, beyond=1)
        waiting = self._server.submit(documents, places, self._capture.head)
        return PendingAnswers(sequences, waiting, self._capture, self._vocabulary, self._stop)

    def capture(self, batch: PendingAnswers) -> Iterator[PendingAnswers]:
        """The batch itself: whoever takes its targets waits for them."""
        yield batch

    def answered(
        self, prompts: Sequences, longest: int, ask: Callable[[Sequences], Sequences]
    ) -> Iterator[Sequences]:
        """The result of `ask`; the server shares its memory among requests itself."""
        yield ask(prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedTeacher:
    """A teacher that a server runs; the interface of `Teacher`."""

    server: Server
    vocabulary: int
    ends: frozenset[int]
    """Ids that end an answer."""
    enough_tokens: int = 0
    """Tokens of a batch that keep a third of all requests busy."""
    name: str = "teacher"
    """For messages."""
    isolation: Isolation = "documents"
    answering: None = None
    follows: bool = False
    is_whole: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def runtime(self) -> str:
        return self.server.served.version

    def close(self) -> None:
        self.server.close()

    def lead(self, sequences: Sequences | None) -> None:
        """Nothing: no other process has a part of this teacher."""

    def answer(
        self, plan: CapturePlan, prompts: Sequences, stop: Callable[[], bool] = lambda: False
    ) -> Sequences:
        """As `Teacher.answer`."""
        assert plan.generate is not None
        return answer_by_engine(
            self.server,
            prompts,
            plan.generate,
            seed=plan.capture.seed,
            ends=self.ends,
            sequence_length=plan.sequence_length,
            stop=stop,
        )

    def expect_that_of(self, store: StoreReader) -> None:
        """Raise ColdstillError unless the server still has the model that began a store. Its
        weights cannot be read, so what it says of the first stored sequences is compared."""
        if not store.done:
            return
        rows = store.manifest.shard_rows(min(store.done))
        block = store.read(np.arange(rows.start, min(rows.stop, rows.start + _COMPARED)))
        forward = ServedForward(self, store.manifest.capture, 1)
        again = forward.prepare(block.sequences).targets()
        rms = root_mean_square(again.label_logprob - block.targets.label_logprob)
        if not rms <= SAME:
            raise ColdstillError(
                f"{store.place}: the server {self.runtime} now has another model than the one that "
                f"began this store: log-probabilities of its first sequences differ by {rms:.2g} "
                "nats; serve that model again, or give this run another name"
            )


def connect(
    model: Any,
    tokenizer: Any,
    *,
    url: str,
    options: ServerOptions,
    vocabulary: int,
    sequence_length: int,
    stage: str,
    report: Reporter = silent,
) -> ServedTeacher:
    """The teacher of a server, after a comparison of the two tokenizers.

    model       as `described_model` gives it
    vocabulary  V, the tokens of `tokenizer`
    stage       for reports

    Raises
        ColdstillError: the server cannot be reached, or does not fit
    """
    rows = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    note = partial(_warn, report, stage)
    server = Server(url, options, vocabulary, note, rows)
    if rows > vocabulary:
        note(
            f"the model has {rows - vocabulary:,} rows beyond the tokens of its tokenizer; a "
            "server counts their probability, which is small in a trained model and is part of "
            "that outside the head"
        )
    try:
        longest = server.served.longest
        # the server wants room for one more token than a text has
        if longest is not None and longest <= sequence_length:
            raise ColdstillError(
                f"{url}: it takes texts of at most {longest - 1} tokens, and "
                f"corpus.sequence_length is {sequence_length}; lower it, or start the server with "
                f"--max-model-len {sequence_length + 1}"
            )
        report(Report(stage=stage, doing="compare the server's tokenizer"))
        server.expect_tokenizer(tokenizer)
    except BaseException:
        server.close()
        raise
    return ServedTeacher(
        server=server,
        vocabulary=vocabulary,
        ends=end_tokens(model, tokenizer),
        enough_tokens=options.requests * sequence_length // 3,
    )


def what_is_served(url: str, options: ServerOptions, stage: str, report: Reporter) -> Served:
    """What a server says of its model. Raises ColdstillError if it does not answer."""
    server = Server(url, options, 0, partial(_warn, report, stage))
    server.close()
    return server.served


def _warn(report: Reporter, stage: str, note: str) -> None:
    report(Report(stage=stage, note=note, warning=True))


def served_identity(name: str, model: Any, served: Served) -> TeacherIdentity:
    """What a manifest says of a served teacher: sizes by its configuration, and the server with the
    name of its model. The weights are not read.

    model  as `described_model` gives it
    """
    dtype = model.config.dtype or torch.float32
    parameters = model.num_parameters()
    return TeacherIdentity(
        name=Path(name).name if Path(name).is_dir() else name,
        fingerprint=json_sha256([served.name, settings_of_model(model.config.to_diff_dict())]),
        family=model.config.model_type,
        dtype=str(dtype).removeprefix("torch."),
        parameters=parameters,
        bytes=parameters * dtype.itemsize,
        engine=EngineIdentity(name=NAME, version=served.version, options={"model": served.name}),
    )
