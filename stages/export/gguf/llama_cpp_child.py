"""The process that llama.cpp runs in: a JSON line a question, a JSON line and fp32 bytes an answer.

Run by `llama_cpp_runtime.py`. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Load a model, then answer."""
    # whatever a C++ library prints must not come between the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    llama = None
    for line in sys.stdin.buffer:
        question = json.loads(line)
        answer: dict[str, Any]
        content = b""
        try:
            if llama is None:
                answer = {"before": _resident()}
                llama = _load(question)
            elif "tokenize" in question:
                text = question["tokenize"].encode()
                answer = {"tokens": llama.tokenize(text, add_bos=False, special=False)}
            else:
                answer, content = _eval(llama, question)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            answer = {"error": str(error).splitlines()[0][:200]}
        answers.write(json.dumps(answer).encode() + b"\n" + content)
        answers.flush()
    os._exit(0)  # its own clean-up fails when the interpreter is half gone


def _resident() -> int:
    """Bytes of memory, where the system tells."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _load(settings: dict[str, Any]) -> Any:
    import llama_cpp

    if not settings["rearranged"]:
        _without_rearranged_weights(llama_cpp)
    return llama_cpp.Llama(
        settings["path"],
        n_ctx=settings["length"],
        n_batch=settings["length"],
        n_ubatch=settings["length"],
        n_threads=settings["threads"],
        n_threads_batch=settings["threads"],
        n_gpu_layers=0,
        logits_all=True,
        verbose=False,
    )


def _without_rearranged_weights(llama_cpp: Any) -> None:
    """The package has no argument for this setting of the library."""
    library = llama_cpp.llama_cpp
    defaults = library.llama_model_default_params

    def changed() -> Any:
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    library.llama_model_default_params = changed


def _eval(llama: Any, question: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    tokens = question["eval"]
    if question["begin"]:
        llama.reset()
    llama._logits_all = not question["last"]
    llama.eval(tokens)
    end = llama.n_tokens
    if question["last"]:  # the only row there is, which the package does not copy
        row = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        logits = np.array(row, dtype=np.float32)[None]
    else:
        logits = np.ascontiguousarray(llama.scores[end - len(tokens) : end], dtype=np.float32)
    return {"shape": list(logits.shape)}, logits.tobytes()


if __name__ == "__main__":
    main()
