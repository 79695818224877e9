"""The process that runs llama.cpp for `runtimes.py`.

Each request is a JSON line on stdin. Each answer is a JSON line on stdout, followed by the fp32
bytes of the logits if there are any. The process ends with its input.
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
    """Load a model, then answer requests."""
    # the C++ library may print to stdout, which must not mix with the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    llama = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        answer: dict[str, Any]
        content = b""
        try:
            if llama is None:
                answer = {"before": _resident()}
                llama = _load(request)
            elif "tokenize" in request:
                text = request["tokenize"].encode()
                answer = {"tokens": llama.tokenize(text, add_bos=False, special=False)}
            else:
                answer, content = _eval(llama, request)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            answer = {"error": str(error).splitlines()[0][:200]}
        answers.write(json.dumps(answer).encode() + b"\n" + content)
        answers.flush()
    os._exit(0)  # the package's clean-up fails while the interpreter shuts down


def _resident() -> int:
    """Resident memory in bytes; 0 if the system does not report it."""
    with contextlib.suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _load(settings: dict[str, Any]) -> Any:
    try:
        import llama_cpp
    except AttributeError as error:  # the bindings name a function that the library lacks
        raise ImportError(f"llama-cpp-python does not fit its library: {error}") from error
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
    """Set a parameter of the library for which the package has no argument."""
    library = llama_cpp.llama_cpp
    defaults = library.llama_model_default_params

    def changed() -> Any:
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    library.llama_model_default_params = changed


def _eval(llama: Any, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    tokens = request["eval"]
    if request["begin"]:
        llama.reset()
    llama._logits_all = not request["last"]
    llama.eval(tokens)
    end = llama.n_tokens
    if request["last"]:  # the only row, which the package does not copy
        row = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),))
        logits = np.array(row, dtype=np.float32)[None]
    else:
        logits = np.ascontiguousarray(llama.scores[end - len(tokens) : end], dtype=np.float32)
    return {"shape": list(logits.shape)}, logits.tobytes()


if __name__ == "__main__":
    main()
