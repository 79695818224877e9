"""Rotary embeddings whose scaling depends on the longest text of a batch, computed per document.

Two kinds of rotary scaling in transformers choose their frequencies by the largest position of the
whole batch. `longrope` tests whether it exceeds the original context, `dynamic` uses its value and
also remembers it for later batches. So a long document would change the embeddings of all documents
of its batch and, with `dynamic`, of later ones. A hook recomputes them for every document with the
frequencies that fit the length of that document.
"""

from __future__ import annotations

from typing import Any

import torch

_LONGROPE, _DYNAMIC = "longrope", "dynamic"


def scale_by_document(model: Any) -> dict[str, int]:
    """Make rotary embeddings depend on the length of each document and not on the batch.

    A document is a run of position ids that increase by one. The hooks stay on the model; a second
    call adds no hooks.

    Returns each kind of scaling that was found with the length up to which it changes nothing. The
    result is empty for nearly all models, which stay unchanged.
    """
    found: dict[str, int] = {}
    for module in model.modules():
        for layer_type, kind in _kinds(module).items():
            found[kind] = min(_threshold(module, layer_type, kind), found.get(kind, 1 << 62))
        if _kinds(module) and not any(
            hook is _by_document for hook in module._forward_hooks.values()
        ):
            module.register_forward_hook(_by_document, with_kwargs=True)
    return found


def _kinds(module: Any) -> dict[str | None, str]:
    """Layer type -> kind of scaling that depends on the batch; the key is None for all layers."""
    own = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len"):
        return {}
    kinds = own if isinstance(own, dict) else {None: own}
    return {
        layer_type: _LONGROPE if kind == _LONGROPE else _DYNAMIC
        for layer_type, kind in kinds.items()
        if isinstance(kind, str) and (kind == _LONGROPE or _DYNAMIC in kind)
    }


def _threshold(module: Any, layer_type: str | None, kind: str) -> int:
    """Tokens up to which a document has the frequencies of the original training."""
    if kind == _DYNAMIC:
        return int(module.original_max_seq_len)
    settings = module.config.rope_parameters
    if layer_type is not None:
        settings = settings[layer_type]
    return int(settings["original_max_position_embeddings"])


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch is untyped here
def _by_document(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: the `[B, T, ...]` output in which each document is as if alone."""
    position_ids, layer_type = _arguments(*args, **kwargs)
    kind = _kinds(module).get(layer_type)
    if kind is None or position_ids is None or position_ids.ndim != 2:
        return None
    lengths_BT = _document_lengths(position_ids)
    beyond_BT = lengths_BT > _threshold(module, layer_type, kind)
    # documents of one group have the same frequencies
    group_BT = beyond_BT.long() if kind == _LONGROPE else lengths_BT * beyond_BT
    groups = torch.unique(group_BT).tolist()
    if kind == _LONGROPE and len(groups) == 1:
        return None
    given = {} if layer_type is None else {"layer_type": layer_type}
    x = args[0] if args else kwargs["x"]
    found = None
    for group in groups:
        inside_BT = group_BT == group
        if kind == _DYNAMIC:
            _reset_frequencies(module, layer_type)
        own = module.forward(x, position_ids.where(inside_BT, 0), **given)
        found = own if found is None else _merged(inside_BT, own, found)
    if kind == _DYNAMIC:
        _reset_frequencies(module, layer_type)
    return found


def _arguments(
    x: Any = None, position_ids: Any = None, layer_type: str | None = None, **_: Any
) -> tuple[Any, str | None]:
    """Position ids and layer type of a call, passed by position or by name."""
    return position_ids, layer_type


def _document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] length of the document of each position.

    The largest position decides: a text that continues a cache has only its last positions here.
    """
    begins_BT = torch.ones_like(position_ids, dtype=torch.bool)
    begins_BT[:, 1:] = position_ids.diff(dim=1) != 1
    number_BT = begins_BT.flatten().cumsum(0) - 1
    lengths_D = torch.zeros_like(number_BT).scatter_reduce(
        0, number_BT, position_ids.flatten() + 1, "amax"
    )
    return lengths_D[number_BT].view_as(position_ids)


def _merged(inside_BT: torch.Tensor, own: Any, others: Any) -> Any:
    """`own` where `inside_BT` holds, otherwise `others`."""
    if isinstance(own, tuple):
        return tuple(_merged(inside_BT, *pair) for pair in zip(own, others, strict=True))
    return torch.where(inside_BT[..., None], own, others)


def _reset_frequencies(module: Any, layer_type: str | None) -> None:
    """Restore the original frequencies, which dynamic scaling replaces for longer texts."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    original = getattr(module, f"{prefix}original_inv_freq")
    now = getattr(module, f"{prefix}inv_freq")
    setattr(module, f"{prefix}inv_freq", original.to(now.device))
    setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
