"""An engine for tests: transformers' own forward pass on one document at a time."""

from __future__ import annotations

from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
from coldstill.stages.capture.teacher import Teacher
from coldstill.stages.models.loading import load_head, load_model, load_tokenizer
from coldstill.stages.models.output_head import connect_head
from coldstill.stages.models.vocabulary import vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from coldstill.stages.models.engines.engine import Asked


class OneByOne:
    """Runs every document alone, and counts tokens."""

    version = "double 1.0"

    def __init__(self, folder: Path) -> None:
        self._model = load_model(str(folder), "teacher.model", precision="fp32")
        self.tokens = 0
        self.documents = 0
        self.closed = False

    @torch.no_grad()
    def submit(self, documents: Sequence[list[int]]) -> Future[list[torch.Tensor]]:
        states = []
        for document in documents:
            self.tokens += len(document)
            self.documents += 1
            inputs = {"input_ids": torch.tensor([document]), "use_cache": False}
            states.append(self._model.base_model(**inputs).last_hidden_state[0])
        future: Future[list[torch.Tensor]] = Future()
        future.set_result(states)
        return future

    def answers(
        self, prompts: Sequence[list[int]], room: Sequence[int], asked: Asked
    ) -> list[list[int]]:
        """The last token of each prompt, again and again."""
        return [[prompt[-1]] * most for prompt, most in zip(prompts, room, strict=True)]

    def close(self) -> None:
        self.closed = True


def engine_teacher(folder: Path, engine: Any = None) -> Teacher:
    """A saved teacher whose layers are run by an engine."""
    model = load_head(str(folder), "teacher.model", precision="fp32")
    size = vocabulary_size(load_tokenizer(str(folder), "teacher.model"))
    head = connect_head(model, size)
    return Teacher(head=head, isolation="documents", engine=engine or OneByOne(folder))
