"""A stand-in for a server of vLLM: its interface over HTTP, and transformers behind it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import torch
from coldstill.stages.models.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Served:
    """A model behind a local address."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(str(folder), "teacher.model", precision="fp32")
        self.tokenizer = load_tokenizer(str(folder), "teacher.model")
        self.real = len(self.tokenizer)
        self.name, self.longest, self.most = "served", 4096, 20
        self.temperature = 1.0
        """Other than 1: its log-probabilities are not those of the model."""
        self.failures: list[int] = []
        """Statuses of the next completions; 0 closes the connection without an answer."""
        self.change: Callable[[list[Any]], object] = len
        """Changes the list of an answer."""
        self.hangs = threading.Event()
        """While set, completions wait."""
        self.shifted = 0
        """Added to the ids of the text of every token, as another tokenizer would."""
        self.together = self.most_together = 0
        self._lock, self.url = threading.Lock(), ""

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None for an unknown path."""
        if path == "/v1/models":
            model = {"id": self.name, "owned_by": "vllm", "max_model_len": self.longest}
            return {"object": "list", "data": [model]}
        if path == "/version":
            return {"version": "1.2.3"}
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/detokenize":
            moved = [(token + self.shifted) % self.real for token in body["tokens"]]
            return {"prompt": self.tokenizer.decode(moved)}
        if path == "/v1/completions":
            return {"choices": [self._complete(body)]}
        return None

    @torch.no_grad()
    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, choice = body["prompt"], {"text": ""}
        ids = torch.tensor([prompt])
        if body.get("return_token_ids"):
            answer = []
            for _ in range(body["max_tokens"]):
                logits = self.model(ids).logits[0, -1, : self.real]
                answer.append(int(logits.argmax()))
                ids = torch.cat([ids, torch.tensor([[answer[-1]]])], 1)
                if answer[-1] in body["stop_token_ids"]:
                    break
            return {**choice, "token_ids": answer}
        logits = self.model(ids).logits[0, :, : self.real] / self.temperature
        logprobs = logits.double().log_softmax(1)
        if self.temperature != 1.0:
            logprobs = logits.double()  # as vLLM lists raw logits
        count, listed = body["prompt_logprobs"], [None]
        best = logprobs.topk(count)
        for place, label in enumerate(prompt[1:]):
            own = {
                str(token): {"logprob": value, "rank": rank}
                for rank, (token, value) in enumerate(
                    zip(best.indices[place].tolist(), best.values[place].tolist(), strict=True), 1
                )
            }
            value = float(logprobs[place, label])
            rank = int((logprobs[place] > value).sum()) + 1
            listed.append({str(label): {"logprob": value, "rank": rank}} | own)  # type: ignore[arg-type]
        self.change(listed)
        return {**choice, "prompt_logprobs": listed}

    def begin(self) -> int | None:
        """Begin a completion; the status with which it fails, or None."""
        with self._lock:
            self.together += 1
            self.most_together = max(self.most_together, self.together)
            return self.failures.pop(0) if self.failures else None

    def end(self) -> None:
        with self._lock:
            self.together -= 1


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that may wait; the default is 5


@contextlib.contextmanager
def serving(served: Served, port: int = 0) -> Iterator[Served]:
    """Serve until the context is left."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(self.path, {})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._send(self.path, json.loads(self.rfile.read(length)))

        def _send(self, path: str, body: dict[str, Any]) -> None:
            completes = path == "/v1/completions"
            failure = served.begin() if completes else None
            try:
                while completes and served.hangs.is_set():
                    time.sleep(0.02)
                if failure == 0:
                    return
                status, answer = 200, served.answer(path, body)
                if completes and body.get("prompt_logprobs", 0) > served.most:
                    status, answer = 400, {"error": {"message": f"more than {served.most} asked"}}
                elif failure is not None or answer is None:
                    status, answer = failure or 404, {"detail": "it failed"}
            finally:  # before the answer, after which the next request may come
                if completes:
                    served.end()
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with _Server(("127.0.0.1", port), Handler) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield served
        finally:
            served.hangs.clear()
            server.shutdown()
            thread.join()
