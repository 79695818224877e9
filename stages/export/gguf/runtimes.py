"""Runs a GGUF file with llama.cpp in a child process, or reads it with transformers.

llama.cpp is a C++ library that aborts its process on errors. On a virtual machine that reports the
processor's matrix unit without providing it, every q8_0 product aborts. So llama.cpp runs in a
child (`llama_cpp_child.py`), and its abort becomes an error message here. A child that aborts while
loading is started once more without llama.cpp's rearranged weights, which only save time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import LlamaConfig

from ....data.errors import ColdstillError
from ...models.loading import load_gguf
from ..contract import Runtime, titled
from ..reference import TorchRuntime

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ..contract import LoadedStudent


def read_back(path: Path, student: LoadedStudent) -> TorchRuntime:
    """The model of a file, in fp32, to check it on machines without llama.cpp.

    transformers dequantises every tensor and restores its own layout, so a tensor under a wrong
    name or in a wrong layout changes the logits. Settings come from the student, because
    transformers ignores some of the file's. So the check does not cover the file's settings and
    tokens and llama.cpp's arithmetic, and the record states this.

    Raises
        ColdstillError: transformers cannot read it
    """
    config: Any = copy.deepcopy(student.model.config)
    if student.family == "mistral":  # a Llama with a window that the file's context fits in
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    model = load_gguf(path, config, path.name)
    return TorchRuntime(model, f"the GGUF reader of {titled('transformers')}", is_own=False)


_TIMEOUT = 900
"""Seconds for one answer; the first one includes reading a large model from disk."""
_EXIT_TIMEOUT = 10


class _EndedError(ColdstillError):
    """The child process has ended."""


@dataclass(frozen=True, eq=False)
class LlamaCpp(Runtime):
    """A loaded file, on the CPU, with as many threads as torch has. The child keeps the cache."""

    child: subprocess.Popen[bytes]
    path: Path
    title: str
    before: int = 0
    """Bytes of the child's memory before it loaded the file."""
    is_own: bool = True

    @property
    def other_process(self) -> tuple[int, int]:
        return self.child.pid, self.before

    @classmethod
    def load(cls, path: Path, student: LoadedStudent) -> LlamaCpp:
        """Open a file, and compare its tokens with the tokenizer's.

        Raises
            ColdstillError: llama.cpp cannot load it, or splits text into other tokens
        """
        title = f"llama.cpp ({titled('llama_cpp_python')})"
        try:
            runtime = _started(path, student.length, title, rearranged=True)
        except _EndedError:
            title += ", plain weights"
            runtime = _started(path, student.length, title, rearranged=False)
        with contextlib.ExitStack() as closed:
            closed.callback(runtime.close)
            for text in student.texts:
                runtime.expect_tokens(student.tokenizer, text)
            closed.pop_all()
        return runtime

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits, or [1, V] with `last`. The cache is True, for the child's own."""
        answer = self.ask({"eval": tokens_T.tolist(), "begin": cache is None, "last": last})
        shape = answer["shape"]
        assert self.child.stdout is not None
        content = self.child.stdout.read(4 * shape[0] * shape[1])
        return np.frombuffer(content, np.float32).reshape(shape), True

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one line, and read one line.

        Raises
            ColdstillError: the child has ended, does not answer, or reports an error
        """
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the child has ended, reported below
            self.child.stdin.write(json.dumps(request).encode() + b"\n")
            self.child.stdin.flush()
        # the last answer was read to its end, so nothing of it is left in the buffer
        if not select.select([self.child.stdout], [], [], _TIMEOUT)[0]:
            self.child.kill()
            raise ColdstillError(f"{self.path.name}: no answer from llama.cpp for {_TIMEOUT} s")
        line = self.child.stdout.readline()
        if not line:
            raise _EndedError(f"{self.path.name}: llama.cpp {_end(self.child.wait())}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ColdstillError(f"{self.path.name}: llama.cpp: {answer['error']}")
        return answer

    def expect_tokens(self, tokenizer: Any, text: str) -> None:
        """Check that llama.cpp splits a text into the tokenizer's tokens."""
        ours = tokenizer(text, add_special_tokens=False).input_ids
        theirs = self.ask({"tokenize": text})["tokens"]
        if ours == theirs:
            return
        pairs = zip(ours, theirs, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        piece = tokenizer.decode(ours[max(0, place - 3) : place + 4])
        raise ColdstillError(
            f"{self.path.name}: llama.cpp splits text into other tokens than the student's "
            f"tokenizer, near {piece!r}: {theirs[place : place + 3]}, expected "
            f"{ours[place : place + 3]}"
        )

    def close(self) -> None:
        for stream in (self.child.stdin, self.child.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # unsent requests
                    stream.close()
        try:
            self.child.wait(_EXIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()


def _started(path: Path, length: int, title: str, *, rearranged: bool) -> LlamaCpp:
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
    with contextlib.ExitStack() as closed:
        closed.callback(runtime.close)
        before = runtime.ask(settings)["before"]
        runtime.step(np.zeros(2, np.int64))
        closed.pop_all()
    return replace(runtime, before=before)


def _end(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit status {code}"
