"""The recipe's table `teacher`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from ...stages.config import (
    ArchitectureConfig,
    GenerateConfig,
    LoraConfig,
    ServerOptions,
    TokenizerConfig,
    TrainConfig,
)


class Table(BaseModel):
    """A table in which unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TeacherTable(Table):
    """The teacher: an existing model, or a new model that is trained in this run."""

    model: str | None = None
    """An existing model: a folder or GGUF file (relative to the recipe), `package:NAME/PATH` for
    one inside an installed Python package, or a hub name."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of the loaded weights; `auto` is the data type of the checkpoint."""
    attention: str | None = None
    """The `attn_implementation` of transformers; transformers chooses it if unset."""
    trust_remote_code: bool = False
    """Whether Python code that comes with `model` (`auto_map` in its files) may run on this
    machine. Read that code first. The store's manifest records this setting."""
    compile: bool = False
    """Run the teacher through `torch.compile`: a slower start, then faster forward passes."""
    device_map: str | dict[str, int | str] | None = None
    """Distribute the teacher over several devices as transformers does: `auto`, or a table of
    module names and devices."""
    tensor_parallel: bool = False
    """Split every layer into slices, one for each process of `torchrun`."""
    architecture: ArchitectureConfig | None = None
    """Sizes of a new teacher; set instead of `model`."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of a new teacher; set together with `architecture`."""
    train: TrainConfig | None = None
    """How a new teacher is trained. With `model`: how that model is corrected, that is, fine-tuned
    on the corpus before its logits are captured."""
    lora: LoraConfig | None = None
    """Correct `model` with low-rank adapters on frozen weights instead of training all weights."""
    generate: GenerateConfig | None = None
    """Let the teacher answer the prompts of the corpus; students learn from these answers."""
    engine: Literal["transformers", "vllm", "server"] = "transformers"
    """The program that runs the teacher's layers. `vllm` captures the same record at serving speed,
    from teachers on several devices or in quantised arithmetic, too. `server` asks a running server
    of vLLM: its record has a head and no samples, so that students learn a lower bound of KL."""
    engine_options: dict[str, Any] = {}
    """Options of the engine. For `vllm` the arguments of `vllm.LLM`, passed on as they are, such as
    `{ tensor_parallel_size = 8 }`. For `server`: `model`, the name under which it serves the
    teacher; `requests`, the most at the same time (32); `timeout` of one in seconds (600)."""
    url: str | None = None
    """Address of the server, such as `http://host:8000/v1`; `model` then names the tokenizer and
    the configuration of what it serves. A key is read from `COLDSTILL_SERVER_KEY`."""

    @property
    def is_trained_here(self) -> bool:
        """Whether this run trains the teacher, either from random weights or from `model`."""
        return self.train is not None

    @model_validator(mode="after")
    def _one_engine(self) -> TeacherTable:
        if (self.url is None) == (self.engine == "server"):
            raise ValueError(
                "has 'url' without engine = \"server\", or that engine without 'url': give both"
            )
        if self.engine == "transformers":
            if self.engine_options:
                raise ValueError(
                    "has 'engine_options' without 'engine': set engine = \"vllm\", or remove them"
                )
            return self
        if self.generate is not None and 0.0 < self.generate.temperature < 0.01:
            raise ValueError(
                f"has generate.temperature = {self.generate.temperature:g}, which vLLM raises to "
                "0.01: set it to 0 or to at least 0.01"
            )
        for key in ("attention", "compile", "device_map", "tensor_parallel"):
            if getattr(self, key):
                raise ValueError(
                    f"has both 'engine' and {key!r}, which is a setting of transformers: remove "
                    "it, and give the engine's own in 'engine_options'"
                )
        if self.url is not None:
            self._expect_served(self.url)
        return self

    def _expect_served(self, url: str) -> None:
        try:
            TypeAdapter(ServerOptions).validate_python(self.engine_options)
        except ValidationError as error:
            first = error.errors()[0]
            known = ", ".join(each.name for each in fields(ServerOptions))
            raise ValueError(
                f"engine_options: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()} "
                f"(a server's are {known})"
            ) from error
        if not url.startswith(("http://", "https://")):
            raise ValueError("url: expected an address that begins with http:// or https://")
        try:
            parts = urlsplit(url)
            fits = parts.hostname and parts.port != 0 and not set(url) & set(" \t\r\n")
        except ValueError:
            fits = False
        if not fits:
            raise ValueError("url: expected an address such as http://HOST:PORT/v1")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "url: it has a user or a query, which messages would show; give a key in the "
                "environment variable COLDSTILL_SERVER_KEY"
            )
        if self.dtype != "auto":
            raise ValueError("has both 'url' and 'dtype': the server decides the precision")
        if self.is_trained_here:
            raise ValueError("has both 'url' and 'train': a server's model cannot be trained")

    @model_validator(mode="after")
    def _one_place(self) -> TeacherTable:
        if self.tensor_parallel and self.device_map is not None:
            raise ValueError(
                "has both 'tensor_parallel' and 'device_map'; keep the one that fits: "
                "several processes in step, or one process with several devices"
            )
        if self.tensor_parallel and self.generate is not None:
            raise ValueError(
                "has both 'tensor_parallel' and 'generate'; distribute a teacher that answers "
                "prompts with 'device_map'"
            )
        return self

    @model_validator(mode="after")
    def _one_or_the_other(self) -> TeacherTable:
        made_here = (self.architecture, self.tokenizer)
        if self.model is not None and any(part is not None for part in made_here):
            raise ValueError(
                "has both 'model' and a table for making one; keep either 'model' (and 'train', to "
                "correct it) or 'architecture', 'tokenizer' and 'train'"
            )
        if self.model is None and self.trust_remote_code:
            raise ValueError(
                "has 'trust_remote_code' without 'model': a new model comes without code; remove "
                "'trust_remote_code'"
            )
        if self.model is None and self.lora is not None:
            raise ValueError(
                "has 'lora' without 'model': the weights of a new model are random, so freezing "
                "them is useless; remove 'lora'"
            )
        if self.model is None and any(part is None for part in (*made_here, self.train)):
            raise ValueError(
                "needs either 'model' or all of 'architecture', 'tokenizer' and 'train'"
            )
        if self.lora is not None and self.train is None:
            raise ValueError(
                "has 'lora' without 'train': set the length of the training, such as train = "
                "{ steps = 100 }, or remove 'lora'"
            )
        return self
