"""Hidden states of a teacher, one file per text: with its head they give whole distributions.

safetensors with `token_ids` [T] and `hidden_states` [T, L, H] (the last of the L layers counts) or
[T, H], or files of `torch.save` with `input_ids`, `hidden_states` and perhaps `loss_mask`. The
state of token t is about token t + 1. Nothing in a file tells whether the last state was taken
before or after the model's final norm: the label's probability under both readings decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..alignment import READINGS, row_positions
from ..errors import ColdstillError, first_line
from ..ragged import Ragged
from .bits import as_float32
from .rows import Context, Distributions, SourceRows, rows_for_each_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from .files import SourceFile

_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_WHOLE = {"I64": "<i8", "I32": "<i4", "U32": "<u4", "U16": "<u2", "U8": "u1", "I16": "<i2",
          "BOOL": "u1", "I8": "i1"}  # fmt: skip
_TOKENS = ("token_ids", "input_ids")
_STATES = "hidden_states"
_COMPARED = 256
"""Rows of the first files that decide about the final norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates:
    """Hidden states of speculators, vLLM, ModelOpt and Automodel."""

    name: ClassVar[str] = "hidden-states"
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".pt", ".pth")
    told_by: ClassVar[tuple[tuple[str, ...], ...]] = ()
    more_columns: ClassVar[tuple[str, ...]] = ()
    names_label: ClassVar[bool] = True
    documented: ClassVar[str] = "next"
    values: ClassVar[str] = "full"
    rounding: ClassVar[float] = 1e-3
    exact: ClassVar[int] = 0
    lost: ClassVar[tuple[str, ...]] = (
        "the precision of the stored states, and of the head that this machine applied",
    )
    rows: ClassVar[int] = 1
    options: ClassVar[tuple[str, ...]] = ()

    vocabulary: int
    logits_of: Callable[[NDArray[Any], bool], NDArray[Any]]
    load: Callable[[bytes, str], Any]
    found: dict[str, str] = field(default_factory=dict)
    """What was measured of the last state."""

    @classmethod
    def configured(cls, context: Context) -> HiddenStates:
        """Raises ColdstillError if the teacher's head is not known."""
        if context.logits_of is None:
            raise ColdstillError(
                "--format hidden-states: the states mean nothing without the teacher's final norm "
                "and head; name its folder with --teacher"
            )
        return cls(
            vocabulary=context.vocabulary,
            logits_of=context.logits_of,
            load=context.load_pickled,
        )

    def settings(self) -> dict[str, Any]:
        return dict(self.found)

    def records(self, files: Sequence[SourceFile], start: int) -> Iterator[SourceRows]:
        ordered = sorted(files, key=lambda file: _natural(file.address))
        if not self.found and ordered:
            self.found["last_state"] = self._measured(ordered)
        for file in ordered[start:]:
            tokens, states, learned = self._read(file)
            yield SourceRows(
                name=file.name,
                first=1,
                tokens=Ragged.from_rows([tokens], np.int64),
                places=rows_for_each_token(np.array([len(states)])),
                ids=np.zeros((len(states), 0), np.int64),
                values=np.zeros((len(states), 0), np.float32),
                full=Distributions(np.arange(len(states)), partial(self._logprobs, states)),
                learned=None if learned is None else Ragged.from_rows([learned], np.bool_),
                faults=_faults(tokens, states, learned),
            )

    def _logprobs(
        self, states: NDArray[Any], rows: NDArray[np.int64], before: bool | None = None
    ) -> NDArray[Any]:
        """[n, V] log-probabilities of some states."""
        if before is None:
            before = self.found["last_state"] == "before the final norm"
        with np.errstate(all="ignore"):  # numbers that are not finite are found by the checks
            logits = self.logits_of(states[rows], before)[:, : self.vocabulary]
            top = logits.max(1, keepdims=True)
            sums = np.exp(logits - top).sum(1, keepdims=True, dtype=np.float64)
            logprobs: NDArray[Any] = (logits - (top + np.log(sums))).astype(np.float32)
        return logprobs

    def _measured(self, files: Sequence[SourceFile]) -> str:
        """Whether the last state is before or after the final norm, by the label's probability."""
        sums, rows = {True: 0.0, False: 0.0}, 0
        for file in files:
            tokens, states, learned = self._read(file)
            if _faults(tokens, states, learned) or not len(states):
                continue
            places = rows_for_each_token(np.array([len(states)]))
            record = Ragged.from_rows([tokens], np.int64)
            _, labels, has = row_positions(record, places, None, READINGS["next"])
            has &= (labels >= 0) & (labels < self.vocabulary)
            chosen = np.flatnonzero(has)[: _COMPARED - rows]
            for before in sums:
                logp = self._logprobs(states, chosen, before)
                sums[before] += float(logp[np.arange(len(chosen)), labels[chosen]].sum())
            rows += len(chosen)
            if rows >= _COMPARED:
                break
        if not np.isfinite(list(sums.values())).any():
            return "before the final norm"  # the checks of the rows name what is wrong
        best = max(sums, key=lambda before: np.nan_to_num(sums[before], nan=-np.inf))
        return "before the final norm" if best else "after the final norm"

    def _read(self, file: SourceFile) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Tokens [T], last states [S, H] and, if the file has it, which tokens are learned [T]."""
        with file.open() as stream:
            content = stream.read()
        if file.address.lower().endswith(".safetensors"):
            found = _tensors(content, file.name)
        else:
            loaded = self.load(content, file.name)
            if not isinstance(loaded, dict):
                raise ColdstillError(f"{file.name}: expected a table of tensors")
            found = {k: v for k, v in loaded.items() if isinstance(v, np.ndarray)}
        name = next((each for each in _TOKENS if each in found), None)
        if name is None or _STATES not in found:
            raise ColdstillError(
                f"{file.name}: expected token_ids and hidden_states; it has "
                f"{', '.join(sorted(found)) or 'nothing'}"
            )
        tokens = found[name].reshape(-1).astype(np.int64)
        states = found[_STATES]
        if states.ndim == 3:
            one_text = states.shape[0] == 1 and len(tokens) == states.shape[1] != 1
            states = states[0] if one_text else states[:, -1]
        if states.ndim != 2:
            raise ColdstillError(
                f"{file.name}: hidden_states has shape {found[_STATES].shape}, expected [T, L, H] "
                "or [T, H]"
            )
        learned = found.get("loss_mask")
        return tokens, states.astype(np.float32), None if learned is None else learned.ravel() > 0


def _faults(
    tokens: NDArray[Any], states: NDArray[Any], learned: NDArray[Any] | None
) -> dict[int, str]:
    if not len(states) <= len(tokens) <= len(states) + 1:
        return {0: f"{len(states)} states for {len(tokens)} tokens"}
    if learned is not None and len(learned) != len(tokens):
        return {0: f"loss_mask has {len(learned)} entries for {len(tokens)} tokens"}
    return {}


def _tensors(content: bytes, name: str) -> dict[str, NDArray[Any]]:
    from safetensors import deserialize

    try:
        parts = deserialize(content)  # type: ignore[no-untyped-call]
    except Exception as error:  # its exceptions have no common class
        raise ColdstillError(
            f"{name}: is not a safetensors file, or it is cut short: {first_line(error)}; fetch it "
            "again"
        ) from error
    found = {}
    for key, part in parts:
        shape, kind = tuple(part["shape"]), part["dtype"]
        raw = np.frombuffer(part["data"], np.uint8)
        if kind in _TYPES:
            found[key] = as_float32(raw, _TYPES[kind]).reshape(shape)
        elif kind in _WHOLE:
            found[key] = raw.view(_WHOLE[kind]).reshape(shape)
    return found


def _natural(address: str) -> list[tuple[int, int, str]]:
    """Sorts `hs_10` behind `hs_9`."""
    return [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in re.split(r"(\d+)", address)]
