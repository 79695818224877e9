"""Loading configurations, tokenizers and models from a folder or a hub, and their identity.

Every call of `from_pretrained` is in this module, so that all weights are checked: a tensor that
is missing, unexpected or of another shape is refused (`completeness.py`). Code that a model brings
runs only if the recipe allows it.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ...data.errors import ColdstillError, first_line
from ...data.files import files_sha256, json_sha256, read_json
from ...data.store.manifest import TeacherIdentity
from .checkpoint import count_parameters, differ, expect_no_adapter, tensor_shapes, weight_files
from .completeness import Found, expect_numbers, expect_whole, found_in
from .device import DTYPES
from .model_files import stored_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_RECIPE_TABLE = re.compile(r"^(teacher|students\.[^.\s]+)")
_GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that are wholly described by tokenizer.json."""
_CHECKED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options with which `from_pretrained` reports faults in tensors, for `expect_whole` to refuse."""


def load_config(name: str, where: str, revision: str = "main", *, own_code: bool = False) -> Any:
    """The configuration of a model in a folder or on a hub.

    own_code  whether code that the model brings may run (`trust_remote_code` of the recipe)

    Raises
        ColdstillError: the configuration is missing, or it needs code that is not allowed
    """
    _expect_present(name, where)
    with _reading(f"cannot load {_searched(name)}", name, where):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=own_code)


def raw_config(name: str, where: str, revision: str = "main") -> dict[str, Any]:
    """The content of `config.json`, read without running any class or code of the model."""
    _expect_present(name, where)
    with _reading(f"cannot load {_searched(name)}", name, where):
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    return dict(settings)


def load_tokenizer(name: str, where: str, revision: str = "main", *, own_code: bool = False) -> Any:
    """The tokenizer of a folder or of a model on a hub.

    Raises
        ColdstillError: the tokenizer is missing, it is not a fast one, or it needs code that is
            not allowed
    """
    _expect_present(name, where)
    with _reading(f"no tokenizer in {_searched(name)}", name, where):
        # AutoTokenizer may choose a class by the model's family, which splits text by its own rule
        generic = get_tokenizer_config(name, revision=revision).get("tokenizer_class") in _GENERIC
        loader = PreTrainedTokenizerFast if generic else AutoTokenizer
        tokenizer = loader.from_pretrained(name, revision=revision, trust_remote_code=own_code)
    if not tokenizer.is_fast:
        raise ColdstillError(
            f"{where}: the tokenizer of {name} is a slow one, which cannot report the characters "
            "that a token covers; convert it to tokenizer.json"
        )
    # all tokens are in tokenizer.json, so that a saved copy loads without the code
    type(tokenizer)._auto_class = None
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


def usual_tokenizer(name: str, where: str) -> Any:
    """The tokenizer that `AutoTokenizer` makes; it may differ from `load_tokenizer`."""
    with _reading(f"no tokenizer in {_searched(name)}", name, where):
        return AutoTokenizer.from_pretrained(name)


def load_model(
    name: str,
    where: str,
    *,
    precision: str,
    attention: str | None = None,
    revision: str = "main",
    own_code: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model in evaluation mode, on the CPU unless `options` place it elsewhere.

    precision  `fp32`, `bf16`, `fp16`, or `auto` for the dtype of the checkpoint
    options    further arguments of `from_pretrained`

    Raises
        ColdstillError: the model is missing, it is not a causal language model, its weights do not
            fit its configuration, or it needs code that is not allowed
    """
    config = load_config(name, where, revision, own_code=own_code)
    _expect_files(name, where, revision, config)
    own = {} if attention is None else {"attn_implementation": attention}
    with _reading(f"cannot load {_searched(name)}", name, where):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if precision == "auto" else DTYPES[precision],
            revision=revision,
            trust_remote_code=own_code,
            **_CHECKED,
            **own,
            **(options or {}),
        )
    _expect_no_loaded_adapter(model, name, where)
    expect_whole(_found(model, info, config), model, name, where)
    expect_numbers(model, name, where)
    return model.eval()


def load_head(
    name: str, where: str, *, precision: str, revision: str = "main", own_code: bool = False
) -> Any:
    """The model without its layers: embeddings, final norm and output head, with its weights.

    For engines that compute the layers themselves. The options are those of `load_model`; the
    weights of the layers are not looked at.

    Raises
        ColdstillError: as `load_model`, or the model cannot be built without layers
    """
    config = load_config(name, where, revision, own_code=own_code)
    _expect_files(name, where, revision, config)
    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    # the engine reads quantised layers; heads and embeddings are stored as they are
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with _reading(f"cannot load the output head of {_searched(name)}", name, where):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if precision == "auto" else DTYPES[precision],
            revision=revision,
            trust_remote_code=own_code,
            **_CHECKED,
        )
    _expect_no_loaded_adapter(model, name, where)
    found = replace(_found(model, info, config), unexpected=())  # those of the layers
    expect_whole(found, model, name, where)
    expect_numbers(model, name, where)
    return model.eval()


def _expect_no_loaded_adapter(model: Any, name: str, where: str) -> None:
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ColdstillError(
            f"{where}: {name} is an adapter of another model; merge it into that model, and give "
            "the path of the result"
        )


def load_state(
    kind: type[Any], config: Any, state: Mapping[str, torch.Tensor], **options: Any
) -> Any:
    """A model of the class `kind` with these weights, in evaluation mode.

    Raises
        ValueError: the weights do not fit the model
        Exception:  any error of transformers
    """
    model, info = kind.from_pretrained(
        None, config=config, state_dict=dict(state), **_CHECKED, **options
    )
    try:
        expect_whole(found_in(model, info), model, "its state", kind.__name__)
    except ColdstillError as error:
        raise ValueError(str(error)) from error
    return model.eval()


def gguf_config(path: Path, where: str) -> Any:
    """The configuration in a GGUF file."""
    with _reading(f"transformers cannot read {path.name}", path.name, where):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def gguf_tokenizer(path: Path, where: str) -> Any:
    """The tokenizer in a GGUF file, as transformers rebuilds it (`gguf_file.split_as_named`)."""
    with _reading(f"transformers cannot rebuild the tokenizer of {path.name}", path.name, where):
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def load_gguf(path: Path, config: Any, where: str) -> Any:
    """The model of a GGUF file in fp32, with the settings of `config`."""
    # transformers draws a progress bar here even if progress bars are turned off
    with (
        _reading(f"transformers cannot read {path.name}", path.name, where),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
            **_CHECKED,
        )
        expect_whole(found_in(model, info), model, path.name, where)
        # transformers saves no model that it has opened from such a file
        return load_state(type(model), config, model.state_dict(), dtype=torch.float32)


def expect_loadable(
    name: str, where: str, revision: str = "main", *, own_code: bool = False
) -> Found:
    """Check names and shapes of a model's weights by the headers of its files.

    This takes seconds, and finds before hours of work what `load_model` would refuse after them.
    """
    config = load_config(name, where, revision, own_code=own_code)
    files = _expect_files(name, where, revision, config)
    shapes = tensor_shapes(files, where)
    if getattr(config, "quantization_config", None) is not None:
        return Found()  # its library has its own format of tensors; loading checks them
    try:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, trust_remote_code=own_code)
        model, info = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict={key: torch.empty(shape, device="meta") for key, shape in shapes.items()},
            device_map={"": "meta"},
            **_CHECKED,
        )
        pairs = [pair for pair in model.all_tied_weights_keys.items() if shapes.keys() >= {*pair}]
        untied = tuple(pair for pair in pairs if differ(files, *pair))
        found = replace(_found(model, info, config), untied=untied)
    except Exception:  # the class cannot be built without memory; loading checks it
        return Found()
    expect_whole(found, model, name, where)
    return found


def described_model(name: str, where: str, revision: str = "main", *, own_code: bool) -> Any:
    """A model without weights, as its configuration and generation settings describe it."""
    config = load_config(name, where, revision, own_code=own_code)
    with _reading(f"cannot build {_searched(name)}", name, where), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=own_code)
    with contextlib.suppress(OSError):  # a folder without such settings
        model.generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    return model


def _found(model: Any, info: Mapping[str, Any], config: Any) -> Found:
    return found_in(model, info, of_text_alone=type(model.config) is not type(config))


def _expect_files(name: str, where: str, revision: str, config: Any) -> list[Path]:
    if Path(name).is_dir():
        expect_no_adapter(Path(name), where)
    return weight_files(name, where, revision, getattr(config, "transformers_weights", None))


@contextlib.contextmanager
def _reading(failure: str, name: str, where: str) -> Iterator[None]:
    """Turn any error of transformers, and its question whether code may run, into one line."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        expect_no_adapter(Path(name), where)
    try:
        yield
    except ColdstillError:
        raise
    except Exception as error:  # the loaders of transformers raise any class
        if "trust_remote_code" not in str(error):
            raise ColdstillError(f"{where}: {failure}: {first_line(error)}") from error
        table = _RECIPE_TABLE.match(where)
        key = f"{table[0]}.trust_remote_code" if table else "trust_remote_code"
        code = ", ".join(sorted(path.name for path in Path(name).glob("*.py"))[:3])
        raise ColdstillError(
            f"{where}: {name} brings its own code{f' ({code})' if code else ''}, which "
            f"transformers would run; read it, and allow it with {key} = true"
        ) from error


def context_length(config: Any) -> int | None:
    """Tokens of the longest input that a model takes; None if its configuration has no limit."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not length or length < 0:
        return None
    scaling = getattr(text, "rope_parameters", None) or {}
    # dynamic scaling begins at this length and extends it by `factor`
    dynamic = scaling.get("rope_type") == "dynamic"
    return int(length * float(scaling.get("factor") or 1.0)) if dynamic else int(length)


def _expect_present(name: str, where: str) -> None:
    """Refuse the name of a file, and a path to a folder that does not exist."""
    if Path(name).is_file():
        raise ColdstillError(f"{where}: {name} is a file, expected a model's folder or GGUF file")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().is_dir() and "/" in name:
        raise ColdstillError(f"{where}: no folder {name}")


def _searched(name: str) -> str:
    """The name for messages, with a hint that a mistyped path was taken as a hub name."""
    return name if Path(name).is_dir() else f"{name} (not a folder here, so taken as a hub name)"


_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Settings that do not change a model's output, or that are recorded separately."""


def settings_of_model(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that change a model's output."""
    return {key: value for key, value in settings.items() if key not in _NOT_OF_THE_MODEL}


def teacher_identity(
    name: str, where: str, *, dtype: str, revision: str, own_code: bool = False
) -> TeacherIdentity:
    """Name, size and a fingerprint of everything that decides a teacher's output.

    Reads the files of the model, but neither loads it nor runs code that it brings.

    Raises
        ColdstillError: the model is missing, or its weights are damaged
    """
    raw = raw_config(name, where, revision)
    family = str(raw.get("model_type"))
    native = family in CONFIG_MAPPING and CONFIG_MAPPING[family].__module__.startswith(
        "transformers."
    )
    # loading the configuration reports a folder that holds no model
    readable = native or not raw.get("auto_map")
    config = load_config(name, where, revision) if readable else None
    settings = raw if config is None else config.to_diff_dict()
    if Path(name).is_dir():
        expect_no_adapter(Path(name), where)
    files = weight_files(name, where, revision, raw.get("transformers_weights"))
    code = []
    if raw.get("auto_map") and (own_code or not readable):
        code = sorted(files[0].parent.glob("*.py"))
    own = raw.get("dtype") or raw.get("torch_dtype") if config is None else config.dtype
    kept = str(own or torch.float32) if dtype == "auto" else str(DTYPES[dtype])
    return TeacherIdentity(
        name=Path(name).name if Path(name).is_dir() else name,
        fingerprint=json_sha256([files_sha256([*files, *code]), settings_of_model(settings)]),
        family=family if config is None else config.model_type,
        dtype=kept.removeprefix("torch."),
        parameters=count_parameters(files, where),
        bytes=sum(path.stat().st_size for path in files),
        trust_remote_code=own_code and _brings_code(files[0].parent, raw),
        weights=stored_weights(files[0].parent),
    )


def _brings_code(folder: Path, config: Mapping[str, Any]) -> bool:
    if config.get("auto_map"):
        return True
    of_tokenizer = folder / "tokenizer_config.json"
    return of_tokenizer.is_file() and bool(read_json(of_tokenizer).get("auto_map"))
