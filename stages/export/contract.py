"""The interface of an export format: it writes a student, and opens the files in their own runtime.

A format loads no heavy library before it writes or opens. So its name, its limits and most refusals
are known at once.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

from ...data.errors import ColdstillError
from ..models.ends import Ends

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

RECORD = "export.json"
"""Name of the record in an export's folder. It exists only if the export is complete and passed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Largest difference between an export and its student. An export beyond any limit is refused.

    Each format states the differences that correct exports showed ("measured"), for random students
    of ten families, for a trained one with 260,032 parameters on 4,306 held-out positions, and for
    SmolLM2-135M. The limits are several times larger. Errors in an export (swapped token rows, a
    wrong rotary layout, a norm without its offset) exceed them by far.
    """

    logprob: float
    """Largest difference of two log-probabilities, over all positions and tokens."""
    kl: float
    """Mean KL(student || export), in nats."""
    share: float
    """Mean KL(student || export) as a share of KL(student || uniform). A student that has learned
    little is close to any model, so `kl` alone would not suffice."""
    cached: float
    """Largest difference of log-probabilities between decoding with the cache and one full pass."""
    agreement: float
    """Least share of positions with the same most probable token. Rounding decides between tokens
    of nearly equal probability, so this limit is the loosest."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedStudent:
    """A trained student as every format gets it."""

    name: str
    folder: Path
    """Folder of its model."""
    model: Any
    """The model in fp32 on the CPU, without padding rows. Exports are compared with it."""
    tokenizer: Any
    vocabulary: int
    """V: number of tokens, and rows of its output head."""
    length: int
    """T: longest sequence of the comparison."""
    own_code: bool = False
    """Run the Python code in the model's folder (`trust_remote_code`)."""
    texts: tuple[str, ...]
    """Held-out texts, to compare tokenizers on."""
    ends: Ends = field(default_factory=Ends)
    """Tokens that end its held-out texts. `model` stops at them."""

    @property
    def family(self) -> str:
        """The model type in transformers."""
        return str(self.model.config.model_type)


class Runtime(ABC):
    """A loaded export."""

    title: str
    """Name and version of the library that runs it."""
    is_own: bool = True
    """Whether this is the runtime that such files are made for. Only then its speed is measured."""

    @property
    def other_process(self) -> tuple[int, int] | None:
        """The process that runs it, if not this one, and its bytes of memory before loading."""
        return None

    @abstractmethod
    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits of the next tokens of one document, and the new cache.

        cache  the cache that the last step returned, which this step consumes; None for the
               beginning of a document
        last   only the last position is needed; a runtime may then return [1, V]
        """

    def close(self) -> None:  # noqa: B027 - most runtimes hold nothing to close
        """Release the runtime."""


class Format(ABC):
    """An export format."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Packages that must be installed."""
    extra: ClassVar[str] = ""
    """The extra of coldstill that installs them."""
    weights: ClassVar[str]
    """Glob pattern of the files that count as its size."""
    library: ClassVar[str]
    """Name of its library on model hubs (`library_name`)."""

    @property
    def base(self) -> str | None:
        """Name of the format that this one is quantised from, if any.

        Rounding can hide errors, so the base is written and checked first within its own limits,
        and its files are then quantised.
        """
        return None

    @property
    @abstractmethod
    def limits(self) -> Limits:
        """Largest difference from the student."""

    @property
    def limits_on_grid(self) -> Limits:
        """Largest difference from a student that was trained for this format (`models/grids.py`):
        its weights are not rounded any further."""
        return self.limits

    @property
    def missing_runtime(self) -> str | None:
        """The extra that installs its own runtime, if that is missing and another one checks it."""
        return None

    @abstractmethod
    def usage(self, name: str) -> str:
        """How to load the export of student `name` from inside its folder, in Markdown."""

    def context(self, student: LoadedStudent) -> int | None:
        """Longest text of the export, if that may be shorter than the student's; None otherwise."""
        return None

    def refusal(self, student: LoadedStudent) -> str | None:
        """Why the format cannot hold this student, and which one can; None if it can hold it."""
        return None

    @abstractmethod
    def write(
        self, student: LoadedStudent, folder: Path, base: Path | None = None
    ) -> Sequence[str]:
        """Write the student into an empty folder, and return notes for the user.

        base  folder of the export in the format `base`, if there is one
        """

    @abstractmethod
    def open(self, student: LoadedStudent, folder: Path) -> Runtime:
        """Load an export from its files.

        student  for what the files do not hold: names, texts to compare tokens on

        Raises
            ColdstillError: its runtime cannot load it
        """


def expect_packages(name: str, form: Format) -> None:
    """Check that the packages of a format are installed."""
    for package in form.packages:
        if importlib.util.find_spec(package) is None:
            raise ColdstillError(
                f"export: --to {name} needs {package}: pip install 'coldstill[{form.extra}]'"
            )


def expect_supported(name: str, form: Format, student: LoadedStudent) -> None:
    """Check that a format can hold a student."""
    reason = form.refusal(student)
    if reason is not None:
        raise ColdstillError(f"students.{student.name}: cannot be written as {name}: {reason}")


def titled(package: str) -> str:
    """A package with its version."""
    return f"{package} {version(package)}"


def transformers_usage(packages: str = "") -> str:
    """How to load a folder with transformers, in Markdown.

    packages  packages that must be installed too
    """
    needed = f"Needs `pip install {packages}`.\n\n" if packages else ""
    return (
        f"{needed}```python\n"
        "from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast\n\n"
        'folder = "."  # the folder of this page\n'
        "tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n"
    )


def chosen_formats(names: Sequence[str], known: Mapping[str, Format]) -> dict[str, Format]:
    """The formats of these names, each once, in the order of `known`.

    Raises
        ColdstillError: there is no name, or an unknown one
    """
    have = f"(have: {', '.join(known)})"
    if not names:
        raise ColdstillError(f"export: name a format with --to {have}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ColdstillError(f"export: --to {unknown[0]}: no such format {have}")
    return {name: form for name, form in known.items() if name in names}
