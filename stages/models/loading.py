"""Loading configurations, tokenizers and models from a folder or a hub.

Everything that calls `from_pretrained` is here, so that no weights come in unlooked at: a tensor
that is missing, unexpected or of another shape is refused (`completeness.py`), and a model's own
code runs only where the recipe allows it.
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from ...data.errors import ColdstillError
from ..libraries import first_line
from .checkpoint import differ, expect_no_adapter, tensor_shapes, weight_files
from .completeness import Found, expect_numbers, expect_whole, found_in
from .device import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_RECIPE_TABLE = re.compile(r"^(teacher|students\.[^.\s]+)")


def load_config(name: str, where: str, revision: str = "main", *, own_code: bool = False) -> Any:
    """The configuration of a model in a folder or of a hub name.

    own_code  whether code that the model brings may run (`trust_remote_code` of the recipe)

    Raises
        ColdstillError: there is none, or it needs code that is not allowed
    """
    expect_present(name, where)
    with _reading(f"cannot load {searched(name)}", name, where):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=own_code)


def raw_config(name: str, where: str, revision: str = "main") -> dict[str, Any]:
    """`config.json` as it is, without any class and any code; raises as `load_config`."""
    expect_present(name, where)
    with _reading(f"cannot load {searched(name)}", name, where):
        settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    return dict(settings)


def load_tokenizer(name: str, where: str, revision: str = "main", *, own_code: bool = False) -> Any:
    """The tokenizer of a folder or a hub name.

    Raises
        ColdstillError: there is none, it is not a fast one (`where` names the recipe's key), or it
            needs code that is not allowed
    """
    expect_present(name, where)
    with _reading(f"no tokenizer in {searched(name)}", name, where):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=own_code
        )
    if not tokenizer.is_fast:
        raise ColdstillError(
            f"{where}: the tokenizer of {name} is of a slow kind that cannot tell which characters "
            "a token covers; convert it to tokenizer.json"
        )
    # its tokens are all in tokenizer.json: a copy of it loads without its code
    type(tokenizer)._auto_class = None
    tokenizer.init_kwargs.pop("auto_map", None)
    return tokenizer


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
    """A causal language model in evaluation mode, on the CPU unless `options` say where.

    precision  `fp32`, `bf16`, `fp16`, or `auto` for what the checkpoint says
    own_code   whether code that the model brings may run (`trust_remote_code` of the recipe)
    options    for `from_pretrained`

    Raises
        ColdstillError: there is no such model, it is not a causal language model, its weights are
            not those of the checkpoint, or it needs code that is not allowed
    """
    config = load_config(name, where, revision, own_code=own_code)
    _expect_files(name, where, revision, config)
    own = {} if attention is None else {"attn_implementation": attention}
    with _reading(f"cannot load {searched(name)}", name, where):
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if precision == "auto" else DTYPES[precision],
            revision=revision,
            trust_remote_code=own_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told with their names below
            **own,
            **(options or {}),
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ColdstillError(
            f"{where}: {name} is an adapter of another model; merge it into that model, and name "
            "the result"
        )
    expect_whole(_found(model, info, config), model, name, where)
    expect_numbers(model, name, where)
    return model.eval()


def load_state(
    kind: type[Any], config: Any, state: Mapping[str, torch.Tensor], **options: Any
) -> Any:
    """A model of the class `kind` with these weights, in evaluation mode.

    Raises
        ValueError: they are not those of such a model
        Exception:  whatever transformers raises
    """
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(state),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )
    try:
        expect_whole(found_in(model, info), model, "its state", kind.__name__)
    except ColdstillError as error:
        raise ValueError(str(error)) from error
    return model.eval()


def load_gguf(path: Path, config: Any) -> Any:
    """The model of a GGUF file in fp32, with the settings of `config`.

    Raises
        ColdstillError: transformers cannot read it, or it is not all of such a model
    """
    # a progress bar is drawn there, whatever transformers was told
    with (
        _reading("transformers cannot read it", path.name, path.name),
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    expect_whole(found_in(model, info), model, path.name, path.name)
    return model.eval()


def expect_loadable(
    name: str, where: str, revision: str = "main", *, own_code: bool = False
) -> Found:
    """Refuse weights that `load_model` would refuse by their names and shapes, from the headers of
    the files alone: what takes seconds should not cost an hour of work first.

    Raises
        ColdstillError: they are not those of the model
    """
    config = load_config(name, where, revision, own_code=own_code)
    files = _expect_files(name, where, revision, config)
    shapes = tensor_shapes(files, where)
    if getattr(config, "quantization_config", None) is not None:
        return Found()  # how its tensors are kept is known to its library: told by loading it
    try:
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config, trust_remote_code=own_code)
        model, info = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict={key: torch.empty(shape, device="meta") for key, shape in shapes.items()},
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        pairs = [pair for pair in model.all_tied_weights_keys.items() if shapes.keys() >= {*pair}]
        untied = tuple(pair for pair in pairs if differ(files, *pair))
        found = replace(_found(model, info, config), untied=untied)
    except Exception:  # a class that cannot be made without memory: told by loading it
        return Found()
    expect_whole(found, model, name, where)
    return found


def _found(model: Any, info: Mapping[str, Any], config: Any) -> Found:
    return found_in(model, info, of_text_alone=type(model.config) is not type(config))


def _expect_files(name: str, where: str, revision: str, config: Any) -> list[Path]:
    if Path(name).is_dir():
        expect_no_adapter(Path(name), where)
    return weight_files(name, where, revision, getattr(config, "transformers_weights", None))


@contextlib.contextmanager
def _reading(failure: str, name: str, where: str) -> Iterator[None]:
    """Make one line of whatever transformers raises, and of its question whether code may run."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        expect_no_adapter(Path(name), where)
    try:
        yield
    except ColdstillError:
        raise
    except Exception as error:  # transformers raises whatever its many loaders raise
        if "trust_remote_code" in str(error):
            raise ColdstillError(_needs_code(name, where)) from error
        raise ColdstillError(f"{where}: {failure}: {first_line(error)}") from error


def _needs_code(name: str, where: str) -> str:
    table = _RECIPE_TABLE.match(where)
    key = f"{table[0]}.trust_remote_code" if table else "trust_remote_code"
    code = ", ".join(sorted(path.name for path in Path(name).glob("*.py"))[:3])
    return (
        f"{where}: {name} brings code of its own{f' ({code})' if code else ''}, which transformers "
        f"would run; read it, and allow it with {key} = true"
    )


def context_length(config: Any) -> int | None:
    """The longest input a model takes, or None if its configuration does not say."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    if not length or length < 0:
        return None
    scaling = getattr(text, "rope_parameters", None) or {}
    # this kind begins to scale there, and goes on for `factor` times as long
    dynamic = scaling.get("rope_type") == "dynamic"
    return int(length * float(scaling.get("factor") or 1.0)) if dynamic else int(length)


def expect_present(name: str, where: str) -> None:
    """Refuse what looks like a folder and is none."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).expanduser().is_dir() and "/" in name:
        raise ColdstillError(f"{where}: no folder {name}")


def searched(name: str) -> str:
    """Where a model was looked for: a misspelled folder reads like a name on the hub."""
    return name if Path(name).is_dir() else f"{name} (no folder here, so taken for one on a hub)"
