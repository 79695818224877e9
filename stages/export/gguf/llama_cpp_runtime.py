"""A GGUF file under llama.cpp, in a process of its own.

llama.cpp is a C++ library that ends its process when something is wrong with it or the machine: on
a virtual machine that shows the processor's matrix unit without lending it, every q8_0 product
does. So it runs in a child (`llama_cpp_child.py`), whose end is a sentence here; and a child that
dies of a signal is begun once more without llama.cpp's rearranged weights, which only speed it up.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ....data.errors import ColdstillError
from ..contract import titled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from ..contract import Source


_PATIENCE = 900
"""Seconds that one answer may take: a large model is read from the disk in it."""
_PARTING = 10


class _EndedError(ColdstillError):
    """The child is no more."""


@dataclass(frozen=True, slots=True, eq=False)
class LlamaCpp:
    """A loaded file, on the CPU, with as many threads as torch has. Its cache is its own."""

    child: subprocess.Popen[bytes]
    path: Path
    title: str
    before: int = 0
    """Bytes of the child's memory before it loaded anything."""
    is_own: bool = True

    @property
    def elsewhere(self) -> tuple[int, int]:
        """In the child."""
        return self.child.pid, self.before

    @classmethod
    def load(cls, path: Path, source: Source) -> LlamaCpp:
        """Open a file, and compare what it makes of text with the tokenizer.

        Raises
            ColdstillError: llama.cpp does not take it, or cuts text into other tokens
        """
        title = f"llama.cpp ({titled('llama_cpp_python')})"
        try:
            runtime = _tried(path, source.length, title, rearranged=True)
        except _EndedError:
            title += ", plain weights"
            runtime = _tried(path, source.length, title, rearranged=False)
        with runtime._closed_on_error():
            for text in source.texts:
                runtime.expect_tokens(source.tokenizer, text)
        return runtime

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, [1, V] where `last`, and a sign that there is a past."""
        answer = self.ask({"eval": tokens_T.tolist(), "begin": cache is None, "last": last})
        shape = answer["shape"]
        assert self.child.stdout is not None
        content = self.child.stdout.read(4 * shape[0] * shape[1])
        return np.frombuffer(content, np.float32).reshape(shape), True

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line there, one line back.

        Raises
            ColdstillError: the child has ended, or tells of an error
        """
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        try:
            self.child.stdin.write(json.dumps(question).encode() + b"\n")
            self.child.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: so does what it says
        # every answer is read whole, so nothing of it waits in a buffer
        if not select.select([self.child.stdout], [], [], _PATIENCE)[0]:
            self.child.kill()
            raise ColdstillError(f"{self.path.name}: llama.cpp gave no answer for {_PATIENCE} s")
        line = self.child.stdout.readline()
        if not line:
            raise _EndedError(f"{self.path.name}: llama.cpp {_end(self.child.wait())}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ColdstillError(f"{self.path.name}: llama.cpp: {answer['error']}")
        return answer

    def expect_tokens(self, tokenizer: Any, text: str) -> None:
        """Refuse a file whose tokens are not the student's.

        Raises
            ColdstillError: the first place where they differ
        """
        ours = tokenizer(text, add_special_tokens=False).input_ids
        theirs = self.ask({"tokenize": text})["tokens"]
        if ours == theirs:
            return
        pairs = zip(ours, theirs, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        piece = tokenizer.decode(ours[max(0, place - 3) : place + 4])
        raise ColdstillError(
            f"{self.path.name}: llama.cpp cuts text into other tokens than the student's "
            f"tokenizer, near {piece!r}: {theirs[place : place + 3]} instead of "
            f"{ours[place : place + 3]}"
        )

    def close(self) -> None:
        """End the child."""
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what it was still to be told
                    stream.close()
        try:
            self.child.wait(_PARTING)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def _tried(path: Path, length: int, title: str, *, rearranged: bool) -> LlamaCpp:
    settings = {
        "path": str(path),
        "length": length,
        "threads": torch.get_num_threads(),
        "rearranged": rearranged,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.llama_cpp_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    runtime = LlamaCpp(child, path, title)
    with runtime._closed_on_error():
        before = runtime.ask(settings)["before"]
        runtime.step(np.zeros(2, np.int64))
    return LlamaCpp(child, path, title, before)


def _end(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"
