"""A student made of some layers of its teacher.

Layer dropping is the cheapest start for a student: DistilBERT (arXiv 1910.01108) keeps every second
layer, Minitron (arXiv 2407.14679) calls it depth pruning. The result is an ordinary model of the
teacher's class.
"""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ....data.errors import ColdstillError, first_line
from ...models.loading import load_config, load_state
from ...training.execution import named_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherWeights:
    """Location of a teacher's weights."""

    name: str
    revision: str = "main"
    own_code: bool = False
    """Whether code that comes with the model may run."""


_NOT_OF_LAYERS = re.compile(r"_token_ids?$|^architectures$")
"""Lists of a configuration that are not per layer, even if they have one entry for each layer."""


def layer_count(teacher: TeacherWeights, where: str) -> int:
    """Number of layers, from the configuration.

    Raises
        ColdstillError: the configuration has no number of layers
    """
    config = load_config(teacher.name, where, teacher.revision, own_code=teacher.own_code)
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(count, int):
        raise _cannot(where, config.model_type, "its configuration has no number of layers")
    return count


def cut_to_layers(teacher: Any, keep: Sequence[int], where: str) -> Any:
    """A model of the teacher's class and precision with only some of its layers.

    Embeddings, norms, output head and everything else stay. The tensors are shared with the
    teacher, which should not be used afterwards.

    keep  numbers of the layers, from 0, increasing

    Raises
        ColdstillError: the layers are not found, or a layer depends on its position in the model
    """
    family = teacher.config.model_type
    found = named_blocks(teacher)
    if found is None:
        raise _cannot(where, family, "its layers are not found")
    name, _ = found
    try:
        student = load_state(
            type(teacher),
            _cut_config(teacher.config, keep),
            _cut_state(teacher.state_dict(), name, keep),
            dtype=teacher.dtype,
        )
        student.config._name_or_path = teacher.config._name_or_path  # transformers sets "None"
        student.generation_config = copy.deepcopy(teacher.generation_config)
        same = _agree(teacher, student, name, keep)
    except Exception as error:  # unusual configurations and models raise any exception
        raise _cannot(where, family, first_line(error)) from error
    if not same:
        raise _cannot(where, family, "its layers depend on their position")
    return student


def _cannot(where: str, family: str, reason: str) -> ColdstillError:
    return ColdstillError(
        f"{where}: cannot remove layers from a {family!r} model: {reason}; start from 'model' or "
        "'architecture'"
    )


def _cut_config(config: Any, keep: Sequence[int]) -> Any:
    """The configuration with fewer layers, also in its lists with one entry per layer."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    count = text.num_hidden_layers
    for name, value in vars(config.get_text_config()).items():
        per_layer = isinstance(value, list | tuple) and len(value) == count
        if per_layer and not _NOT_OF_LAYERS.search(name):
            setattr(text, name, type(value)(value[layer] for layer in keep))
    text.num_hidden_layers = len(keep)
    return cut


def _cut_state(
    state: Mapping[str, torch.Tensor], name: str, keep: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Weights without the removed layers, under the new numbers of the kept ones."""
    numbers = {old: new for new, old in enumerate(keep)}
    layer = re.compile(rf"^{re.escape(name)}\.(\d+)\.")
    cut: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        found = layer.match(key)
        if found is None:
            cut[key] = tensor
        elif (number := numbers.get(int(found[1]))) is not None:
            cut[f"{name}.{number}.{key[found.end() :]}"] = tensor
    return cut


@torch.no_grad()
def _agree(teacher: Any, student: Any, name: str, keep: Sequence[int]) -> bool:
    """Whether the student's logits equal the teacher's with its other layers skipped."""
    rows = teacher.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(rows, 256), (1, 16), generator=generator)
    blocks = teacher.get_submodule(name)
    with skipped(*(block for number, block in enumerate(blocks) if number not in keep)):
        theirs = teacher(input_ids=tokens, use_cache=False).logits
    ours = student(input_ids=tokens, use_cache=False).logits
    # the same operations in the same order; a wrong layer differs far more
    tolerance = 1e-5 if theirs.dtype == torch.float32 else 2e-2
    scale = float(theirs.abs().max())
    return bool(torch.allclose(ours, theirs, rtol=0.0, atol=tolerance * scale, equal_nan=True))


@contextlib.contextmanager
def skipped(*layers: torch.nn.Module) -> Iterator[None]:
    """Skip layers in forward passes."""
    hooks = [layer.register_forward_hook(skip_layer, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def skip_layer(
    module: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
) -> Any:
    """Forward hook that returns the layer's input unchanged."""
    states = inputs[0] if inputs else named["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states
