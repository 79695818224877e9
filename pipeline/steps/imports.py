"""Imports a cache of another project: finds its tokenizer and its codec's parameters, and runs."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...data.errors import ColdstillError, first_line
from ...stages.report import Report, Reporter, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ...data.imports.importing import Result
    from ...data.imports.plan import Request

STAGE = "import"
_BESIDE = ("compression_config", "legacy_logit_compression")
"""Names of the files of parameters that a writer leaves beside its data."""


def import_cache(request: Request, report: Reporter = silent) -> Result:
    """Make a store of a source, or continue an import.

    request  what to import; its tokenizer is a name that `tokenizer_of` understands

    Raises
        ColdstillError: the source breaks a rule, or fits neither the tokenizer nor any alignment
    """
    from ...data.imports import FORMATS
    from ...data.imports.importing import Importer
    from ...data.imports.plan import found

    def say(sentence: str) -> None:
        report(Report(stage=STAGE, note=sentence))

    name, _ = found(request)  # before a tokenizer is looked for on a hub
    beside: Mapping[str, Any] = {}
    if not request.config and "--config" in FORMATS[name].options:
        beside = _config_beside(request.source, say)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = tokenizer_of(str(request.tokenizer), Path(scratch))
        done = 0

        def notify(positions: int, records: int) -> None:
            nonlocal done
            step, done = positions - done, positions
            report(Report(stage=STAGE, done=positions, step=step, unit="positions",
                          figures={"records": float(records)}))  # fmt: skip

        report(Report(stage=STAGE, doing="measure the first records"))
        full = replace(
            request,
            tokenizer=tokenizer,
            config=request.config or beside,
            load_pickled=load_pickled,
            logits_of=_head_of(request, tokenizer, report),
            render=_renderer(tokenizer),
        )
        return Importer(full, notify, say).run()


def tokenizer_of(name: str, scratch: Path) -> Any:
    """The tokenizer that a user names: a folder, its tokenizer.json, a GGUF file, a model on a hub,
    or `package:NAME/PATH`. Raises ColdstillError if there is none."""
    from ...data.packaged import packaged

    where = "--tokenizer"
    path = packaged(name, where) or Path(name).expanduser()
    if path.name == "tokenizer.json" and path.is_file():
        path = path.parent
    if path.is_file():
        from ...stages.models.gguf_file import unpacked

        path = unpacked(path, where)
    if (path / "tokenizer.json").is_file() and not (path / "tokenizer_config.json").is_file():
        return str(path)
    from ...stages.models.loading import load_tokenizer

    return load_tokenizer(str(path) if path.exists() else name, where)


def read_config(path: str) -> dict[str, Any]:
    """A table from a YAML or JSON file, or from one at an address. Raises ColdstillError if it is
    neither."""
    try:
        if "://" in path:
            import fsspec

            with fsspec.open(path, "r", encoding="utf-8") as stream:
                text = stream.read()
        else:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        if path.endswith(".json"):
            value = json.loads(text)
        elif importlib.util.find_spec("yaml") is None:
            raise ColdstillError(f"--config {path}: needs the package PyYAML; pip install pyyaml")
        else:
            import yaml

            value = yaml.safe_load(text)
    except ColdstillError:
        raise
    except Exception as error:  # yaml has its own exceptions
        raise ColdstillError(f"--config {path}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict) or not value:
        raise ColdstillError(f"--config {path}: expected a table of parameters")
    return value


def _config_beside(source: tuple[str, ...], say: Callable[[str], None]) -> Mapping[str, Any]:
    """The parameters that a writer left beside its data; empty if there are none."""
    import fsspec

    for entry in source:
        if entry.startswith("hub:"):
            continue
        if "://" in entry:
            system, path = fsspec.core.url_to_fs(entry)
            folder = path if system.isdir(path) else path.rpartition("/")[0]
            exists, named = system.isfile, system.unstrip_protocol
        else:
            path = os.path.expanduser(entry)
            folder = path if os.path.isdir(path) else os.path.dirname(path)
            exists, named = os.path.isfile, str
        for name in _BESIDE:
            for suffix in (".json", ".yaml", ".yml"):
                file = os.path.join(folder, f"{name}{suffix}")
                if exists(file):
                    say(f"the codec's parameters are those of {named(file)}")
                    return read_config(named(file))
    return {}


def load_pickled(content: bytes, name: str) -> Any:
    """The values of a `torch.save` file, with arrays for tensors; no code of the file runs."""
    import io

    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return value

    try:
        return plain(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    except Exception as error:  # of unpickling, of the archive, of what is not allowed
        raise ColdstillError(
            f"{name}: is not a file of tensors alone: {first_line(error)}; fetch it again"
        ) from error


def _head_of(
    request: Request, tokenizer: Any, report: Reporter
) -> Callable[[Any, bool], Any] | None:
    """The teacher's final norm and head as a function of hidden states, if its folder is given."""
    if request.format not in (None, "hidden-states") or not Path(request.teacher).is_dir():
        return None
    from ...data.tokenizer_files import tokenizer_identity
    from ...stages.models.final_head import FinalHead

    where = "--teacher"
    return FinalHead(request.teacher, where, tokenizer_identity(tokenizer, None).size, report)


def _renderer(tokenizer: Any) -> Callable[[Any], list[int]] | None:
    """Chats as token ids by the tokenizer's template, or None if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def render(messages: Any) -> list[int]:
        from ...stages.libraries import asking

        with asking("transformers", "write a chat", where="--tokenizer"):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return ids

    return render
