"""The figures of a model, as `evaluation.json` and a row of the comparison hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


REMEASURE = "delete it and run coldstill evaluate"
"""The remedy in messages about damaged figures."""


class Record(BaseModel):
    """A part of a JSON file that commands write: strict types, finite numbers, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def read(cls, path: Path, remedy: str) -> Self:
        """Read and check a file.

        remedy  what to do about a damaged file, for the message

        Raises
            ColdstillError: the file cannot be read, or a figure is missing or has another type
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ColdstillError(f"{path}: damaged; {remedy}") from error


class Speed(Record):
    """How fast a model reads and writes `batch` texts at once."""

    batch: int
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    first_token_seconds: float
    prefill_tokens_per_second: float
    token_seconds: float
    """Median time of a further token."""
    token_seconds_p95: float
    decode_tokens_per_second: float
    memory_bytes: int | None = None
    """Peak memory, weights included; None where it is not known."""


class CalibrationBin(Record):
    """Positions whose confidence falls into one bin; both means are None in an empty bin."""

    count: int
    confidence: float | None
    accuracy: float | None

    @property
    def distance(self) -> float:
        """Distance of the accuracy from the confidence; 0 in an empty bin."""
        return abs((self.accuracy or 0.0) - (self.confidence or 0.0))


class Quality(Record):
    """Figures of a model on held-out text."""

    loss: float | None
    """Mean -log q(label) in nats; None for a teacher whose record cannot give it, as for its other
    figures."""
    kl: float
    """Mean KL(teacher || model) in nats."""
    agreement: float
    """Share of positions with the teacher's most probable token."""
    accuracy: float
    """Share of positions whose most probable token is the label."""
    acceptance: float | None
    """Expected share of tokens that speculative decoding accepts; None where the teacher's mass
    outside the head is not known."""
    ece: float | None
    """Expected calibration error."""
    calibration: tuple[CalibrationBin, ...] = ()
    """Bins of equal width over the confidence; older versions wrote none."""


class OwnText(Record):
    """Figures of a student on its own answers to held-out prompts."""

    round: int
    """Number of the training that made the measured model, from 1."""
    positions: int
    kl: float
    agreement: float
    acceptance: float


class ModelFigures(Quality):
    """All figures of a teacher, a student or an export.

    Keys with a default are newer than the first version or not known of every model. A key that a
    file lacks is also left out when the figures are written.
    """

    name: str
    """Name in every output, with the run's label before it where several runs are compared."""
    role: Literal["teacher", "student", "export"] = "student"
    run: str | None = None
    """Label of the run; None where only one run is compared."""
    of: str | None = None
    """Name of the student that an export was made from."""
    format: str | None = None
    """Format of an export."""
    parameters: int
    bytes: int = Field(ge=0)
    """Size of the weight files."""
    perplexity: float | None
    positions: int | None = None
    """Held-out positions it was measured on."""
    bits_per_byte: float | None = None
    """Loss in bits for each byte of text; None where the bytes are not known."""
    own_text: tuple[OwnText, ...] = ()
    """Figures on its own text for each of its rounds that the teacher scored; the last one is that
    of the student itself, if its last round is scored."""
    cached_bytes_per_position: float | None = None
    """Bytes for each position of the stores it was trained from: 0 without a teacher."""
    flops_per_token: int | None = None
    """Operations of a forward pass."""
    generation: tuple[Speed, ...] = ()
    caveats: tuple[str, ...] = ()
    """What the figures cannot say because of what the held-out store lacks."""
    dtype: str = ""
    """Precision of the weights on disk."""
    grid: str = ""
    """Scheme of few bits whose rounded values the weights are, such as `int4`."""
    machine: str = ""
    runtime: str = ""
    """Library that ran it."""
    weights: str | None = None
    """SHA-256 of the measured weights."""
    heldout: str | None = None
    """Identity of the held-out store."""
    tokens: str | None = None
    """SHA-256 of its tokens, if they are not the teacher's."""
    sample_positions: int | None = None
    """Positions on which an export was checked against its student."""
    kl_from_student: float | None = None
    """Mean KL of an export from its student, in nats."""
    older_than_weights: bool = False
    """Whether the weight files are newer than the figures."""
    stale_exports: tuple[str, ...] = ()
    """Formats of exports that were made from other weights."""
    settings: dict[str, Any] | None = None
    """Values of a sweep's grid at this student."""

    @model_validator(mode="after")
    def _expect_known(self) -> Self:
        """Figures are missing only where the held-out store lacks something, and says so."""
        of_model = None in (self.loss, self.perplexity, self.ece)
        if (of_model or self.acceptance is None) and not self.caveats:
            raise ValueError("a figure is missing")
        if of_model and self.role != "teacher":
            raise ValueError("a figure of the student itself is missing")
        return self

    @property
    def is_export(self) -> bool:
        return self.role == "export"

    @property
    def short_name(self) -> str:
        """Name for a place that shows the student already: the format of an export."""
        return self.format if self.is_export and self.format else self.name

    @property
    def own_loss(self) -> float:
        """The loss of a student or an export, which is always known."""
        assert self.loss is not None
        return self.loss

    def on_own_text(self, figure: str) -> float | None:
        """A figure on the text that it wrote after its last scored round; None if there is none."""
        return getattr(self.own_text[-1], figure) if self.own_text else None

    def speed(self, batch: int = 1) -> Speed | None:
        """Figures of generating that many texts at once; None if they were not measured."""
        return next((one for one in self.generation if one.batch == batch), None)

    def has(self, *keys: str) -> bool:
        """Whether the file that was read has these keys: older versions wrote fewer."""
        return self.model_fields_set.issuperset(keys)

    def to_json(self) -> dict[str, Any]:
        """A JSON value with the keys that are set."""
        return self.model_dump(mode="json", exclude_unset=True)


def json_rows(rows: Iterable[ModelFigures]) -> list[dict[str, Any]]:
    return [row.to_json() for row in rows]


def students_of(rows: Sequence[ModelFigures]) -> list[ModelFigures]:
    """The rows of students, without teachers and exports."""
    return [row for row in rows if row.role == "student"]


def teachers_of(rows: Sequence[ModelFigures]) -> list[ModelFigures]:
    return [row for row in rows if row.role == "teacher"]
