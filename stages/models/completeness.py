"""Checks that a loaded model has exactly the weights of its checkpoint.

transformers fills missing tensors with random numbers and ignores unexpected ones; it only logs
both. Here both are errors, which name the tensors and the likely cause.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

_SHOWN = 3
"""Most names in a message."""
_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_OTHER_PARTS = re.compile(r"vision|visual|image|audio|speech|multi_?modal|vq", re.IGNORECASE)
"""Names of tensors that a multimodal model has besides its text model."""
_WRAPPERS = {
    "_orig_mod": "of a model that torch.compile has wrapped; save the model inside (_orig_mod)",
    "module": "of a model inside DataParallel or DistributedDataParallel; save the model inside "
    "(.module)",
    "_fsdp_wrapped_module": "of a model inside FSDP; gather its full state and save that",
    "_checkpoint_wrapped_module": "of a model with wrapped layers; save the model without them",
    "base_layer": "of a model with adapters; merge them (peft: merge_and_unload) and save that",
    "base_model": "of a model inside peft; merge its adapters (merge_and_unload) and save that",
}
"""Known parts of tensor names -> how they come into a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Faults found while loading a model, by tensor names."""

    missing: tuple[str, ...] = ()
    """Tensors that only the model has."""
    unexpected: tuple[str, ...] = ()
    """Tensors that only the file has."""
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    """Name, shape in the file and shape in the model of each tensor whose shapes differ."""
    untied: tuple[tuple[str, str], ...] = ()
    """Pairs that are tied by the configuration and differ in the file."""
    other_parts: int = 0
    """Number of ignored tensors that do not belong to the text model."""

    @property
    def is_whole(self) -> bool:
        """Whether no fault was found."""
        return not (self.missing or self.unexpected or self.reshaped or self.untied)


def found_in(model: Any, info: Mapping[str, Any], *, of_text_alone: bool = False) -> Found:
    """Faults of a model that was just loaded.

    transformers has already excluded tensors that the model's class declares as derivable: tied
    tensors, buffers and ignored names.

    info           the loading information of transformers
    of_text_alone  the checkpoint belongs to a multimodal model of which only the text part is used
    """
    named = getattr(model, "get_expanded_tied_weights_keys", None)
    tied = getattr(model, "all_tied_weights_keys", None)
    untied: dict[str, str] = {}
    if named is not None and isinstance(tied, dict):
        # transformers removes a pair from the table if the file has both and they differ
        untied = {k: v for k, v in named(all_submodels=True).items() if k not in tied}
    unexpected = sorted(map(str, info["unexpected_keys"]))
    others = [key for key in unexpected if of_text_alone and _OTHER_PARTS.search(key)]
    return Found(
        missing=tuple(sorted(map(str, info["missing_keys"]))),
        unexpected=tuple(key for key in unexpected if key not in others),
        reshaped=tuple(sorted((str(k), tuple(a), tuple(b)) for k, a, b in info["mismatched_keys"])),
        untied=tuple(sorted(untied.items())),
        other_parts=len(others),
    )


def expect_whole(found: Found, model: Any, what: str, where: str) -> None:
    """Refuse a model with a fault in `found`; `what` is the name of the checkpoint."""
    if found.is_whole:
        return
    if not (found.missing or found.unexpected or found.reshaped):
        target, source = found.untied[0]
        raise ColdstillError(
            f"{where}: {what}: its config.json sets tie_word_embeddings = true, so {target} and "
            f"{source} are one tensor, but the file has both and they differ; set it to false to "
            f"use both as they are, or remove {target} from the file"
        )
    reshaped = [
        f"{name} {list(in_file)} in the file, {list(in_model)} by config.json"
        for name, in_file, in_model in found.reshaped
    ]
    parts = [
        f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind} ({_listed(names)})"
        for kind, names in (
            ("missing", found.missing),
            ("unexpected", found.unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    raise ColdstillError(
        f"{where}: the weights in {what} are not those of a {type(model).__name__} with its "
        f"config.json: {', '.join(parts)}: {_reason(found, model)}"
    )


def expect_numbers(model: Any, what: str, where: str) -> None:
    """Refuse NaN or infinite weights, and weights that were not loaded into memory."""
    placed = getattr(model, "hf_device_map", None)
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            if placed is None:
                raise ColdstillError(f"{where}: {what}: no numbers were loaded for {name}")
            continue  # offloaded to disk
        tensor = parameter.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        is_quantised = type(tensor) is not torch.Tensor or tensor.element_size() < 2
        if is_quantised or not tensor.is_floating_point():
            continue
        # a finite sum proves finite numbers in one pass and without memory of the tensor's size
        if not tensor.sum(dtype=torch.float32).isfinite() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            values = "1 value that is" if bad == 1 else f"{bad:,} values that are"
            raise ColdstillError(
                f"{where}: {what}: {name} holds {values} NaN or infinite in "
                f"{str(tensor.dtype).removeprefix('torch.')}; fetch or save the model again, or "
                "load it in another precision"
            )


def _reason(found: Found, model: Any) -> str:
    """The most likely cause and the remedy."""
    if any(".lora_" in key for key in found.unexpected):
        return (
            "the file holds adapters that were not merged; merge them (peft: merge_and_unload) and "
            "save the result"
        )
    if (extra := _extra_part(found, model.state_dict().keys())) is not None:
        known = _WRAPPERS.get(extra.strip(".").split(".")[0])
        cause = f"that is the state {known}" if known else "rename them, or save the model again"
        return f"the names in the file carry {extra!r}, which the model's do not: {cause}"
    if found.reshaped and not found.missing and not found.unexpected:
        return "config.json and the weights belong to different models; fetch both from one place"
    head = _head_names(model)
    if found.missing and head.issuperset(found.missing) and not found.reshaped:
        task = f"; the file is for another task ({_listed(found.unexpected)})"
        return (
            "the head is neither in the file nor tied to the embedding (tie_word_embeddings = "
            f"false){task if found.unexpected else ''}; fetch the causal language model, or set "
            '"tie_word_embeddings": true in config.json if its head is its embedding'
        )
    if gone := _whole_layers(found, model):
        return f"the file lacks layer {_listed(gone)}; fetch or save the model again"
    if beyond := _layers_beyond(found, model):
        return (
            f"the file has layers up to {max(beyond)}, config.json asks for "
            f"{_layer_count(model)}; correct num_hidden_layers, or fetch the model again"
        )
    return (
        f"they would be {'random numbers' if found.missing else 'ignored'}; fetch or save the "
        "model again, with the config.json that belongs to it"
    )


def _extra_part(found: Found, model_keys: Collection[str]) -> str | None:
    """A part such as `_orig_mod.` without which most unexpected names equal missing ones."""
    words = {word for key in model_keys for word in key.split(".")}
    missing, matched = set(found.missing), 0
    extra: dict[str, int] = {}
    for key in found.unexpected:
        parts = key.split(".")
        for without in _shortened(parts, words):
            if ".".join(without) in missing:
                gone = ".".join(parts[: len(parts) - len(without)])
                odd = [part for part in parts if part not in words and not part.isdigit()]
                name = f"{'.'.join(odd) if odd else gone}."
                extra[name] = extra.get(name, 0) + 1
                matched += 1
                break
    if not extra or 2 * matched < len(found.unexpected):
        return None
    return max(extra, key=lambda name: extra[name])


def _shortened(parts: list[str], words: Collection[str]) -> Iterable[list[str]]:
    """The name without parts that the model does not know, and without its first parts."""
    yield [part for part in parts if part in words]
    for begin in range(1, len(parts) - 1):
        yield parts[begin:]
        yield [part for part in parts[begin:] if part in words]


def _head_names(model: Any) -> set[str]:
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if module is head and head is not None
        for name in (f"{name}.weight", f"{name}.bias")
    }


def _layers(keys: Iterable[str]) -> list[int]:
    return sorted({int(found[2]) for key in keys if (found := _LAYER.match(key))})


def _whole_layers(found: Found, model: Any) -> list[int]:
    """Layers that are missing completely, if there is no other fault."""
    layers = _layers(found.missing)
    of_layers = {
        key for key in model.state_dict() if (m := _LAYER.match(key)) and int(m[2]) in layers
    }
    alone = not found.unexpected and not found.reshaped
    return layers if alone and of_layers == set(found.missing) else []


def _layers_beyond(found: Found, model: Any) -> list[int]:
    """Layers that only the file has, if there is no other fault."""
    if found.missing or found.reshaped:
        return []
    return [layer for layer in _layers(found.unexpected) if layer >= _layer_count(model)]


def _layer_count(model: Any) -> int:
    return int(getattr(model.config.get_text_config(), "num_hidden_layers", 1 << 30))


def _listed(names: Collection[Any]) -> str:
    shown = ", ".join(str(name) for name in list(names)[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
