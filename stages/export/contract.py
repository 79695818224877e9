"""What it takes to leave here: a format that writes a student, and a runtime that runs it.

A format is a frozen dataclass that loads nothing heavy before it must, so that its name, its limits
and its refusals are known at once.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from ...data.errors import ColdstillError
from ..models.ends import Ends

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How far an export may be from its student: beyond any of these it is refused.

    They are several times what sound exports showed, which each format tells beside its own
    (`measured`): of random students in ten families, and of a trained one of 260,032 parameters on
    4,306 held-out positions. What is written wrongly shows far beyond: a token's row taken for
    another's, a rotary embedding laid out wrongly, a norm without its one.
    """

    logprob: float
    """Largest difference of two log-probabilities, over all positions and tokens."""
    kl: float
    """Mean KL(student || export), in nats;"""
    share: float
    """and over what the student knows, its mean KL from the uniform distribution: a student that
    knows little is near to anything."""
    cached: float
    """As `logprob`, between the export token by token and itself all at once."""
    agreement: float
    """Least share of positions with the same most probable token. Where two tokens are nearly as
    probable, rounding decides, so this is the loosest of the three."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """A finished student, as every format gets it."""

    name: str
    folder: Path
    """Where its model lies."""
    model: Any
    """In fp32, on the CPU, without padding: what the export is held against."""
    tokenizer: Any
    vocabulary: int
    """V: how many tokens there are, and rows in its head."""
    length: int
    """T: the longest sequence that it is asked about here."""
    own_code: bool = False
    """Whether code that lies beside its weights may run."""
    texts: tuple[str, ...]
    """Held-out text, to try tokenizers on."""
    ends: Ends = field(default_factory=Ends)
    """How its held-out texts end; `model` stops there."""

    @property
    def family(self) -> str:
        """What transformers calls its kind."""
        return str(self.model.config.model_type)


class Runtime(Protocol):
    """A loaded export."""

    @property
    def title(self) -> str:
        """Its name and version."""
        ...

    @property
    def is_own(self) -> bool:
        """Whether it is what such files are made for: then its speed says something of them."""
        ...

    @property
    def elsewhere(self) -> tuple[int, int] | None:
        """The process it runs in, if not in this one, and its bytes of memory before it loaded."""
        ...

    def step(
        self, tokens_T: NDArray[Any], cache: Any = None, *, last: bool = False
    ) -> tuple[NDArray[Any], Any]:
        """[T, V] fp32 logits of the next tokens of one document, and the cache for those after.

        cache  what the step before gave; None begins a document. It is used up.
        last   only the last place's are wanted, as where text is written: a runtime that can leave
               the others out gives [1, V]
        """
        ...

    def close(self) -> None:
        """End what it has begun."""
        ...


class Format(Protocol):
    """A way to write a student down."""

    @property
    def base(self) -> str | None:
        """The format that it is quantised from, if it is. What rounding may do to a student is more
        than many a fault in what was written does, so that is written and checked first, within its
        own limits, and then this is made of the very files."""
        ...

    @property
    def limits(self) -> Limits:
        """How far it may be from the student."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """What must be importable,"""
        ...

    @property
    def extra(self) -> str:
        """and the extra that brings it."""
        ...

    @property
    def weights(self) -> str:
        """The files that are counted as its size, as a pattern."""
        ...

    @property
    def lacking(self) -> str | None:
        """The extra that brings its own runtime, where that is not here and another checks it."""
        ...

    @property
    def library(self) -> str:
        """What model hubs call those that load it,"""
        ...

    def usage(self, name: str) -> str:
        """and how they do, in Markdown, from inside its folder. `name` is the student's."""
        ...

    def context(self, source: Source) -> int | None:
        """The longest text that it takes, where that may be less than the student does."""
        ...

    def refusal(self, source: Source) -> str | None:
        """Why this student cannot be written so (and what can), or None."""
        ...

    def write(self, source: Source, folder: Path, base: Path | None = None) -> Sequence[str]:
        """Write it into an empty folder; what the user should know of it, in sentences.

        base  where that of `base` lies, for those that have one
        """
        ...

    def open(self, source: Source, folder: Path) -> Runtime:
        """Load what `write` wrote, from the files alone.

        source  for what cannot be known from the files: names, and the text to try tokens on

        Raises
            ColdstillError: its runtime cannot load it
        """
        ...


def expect_packages(name: str, form: Format) -> None:
    """Refuse at once what needs a package that is not here.

    Raises
        ColdstillError: the first that is missing, with the command that brings it
    """
    for package in form.packages:
        if importlib.util.find_spec(package) is None:
            raise ColdstillError(
                f"export: --to {name} needs {package}: pip install 'coldstill[{form.extra}]'"
            )


def expect_known(name: str, form: Format, source: Source) -> None:
    """Refuse a student that this format has no place for.

    Raises
        ColdstillError: its family, or what of it
    """
    reason = form.refusal(source)
    if reason is not None:
        raise ColdstillError(f"students.{source.name}: cannot be written as {name}: {reason}")


def titled(package: str) -> str:
    """A package with its version."""
    return f"{package} {version(package)}"


def transformers_usage(packages: str = "") -> str:
    """How to load a folder with transformers, in Markdown.

    packages  what must be installed too
    """
    needed = f"Needs `pip install {packages}`.\n\n" if packages else ""
    return (
        f"{needed}```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this page lies\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))\n```\n"
    )


def choose(names: Sequence[str], known: Mapping[str, Format]) -> dict[str, Format]:
    """The formats of these names, each once, in the order of the table.

    Raises
        ColdstillError: an unknown name, or none at all
    """
    have = f"(have: {', '.join(known)})"
    if not names:
        raise ColdstillError(f"export: say which format with --to {have}")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ColdstillError(f"export: --to {unknown[0]}: no such format {have}")
    return {name: form for name, form in known.items() if name in names}
