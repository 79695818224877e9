"""What is asked of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .contract import Format
    from .model_card import Facts

RECORD = "export.json"
"""There when an export is whole and was found to say what its student says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One student, and where it goes."""

    name: str
    model: Path
    """The folder of the finished model."""
    facts: Facts
    formats: Mapping[str, Format]
    folder: Path
    """Each format gets a folder of its name here."""
    heldout: str
    """What the held-out store is known by in records of figures."""
    own_code: bool = False
    """Whether code that lies beside the model's weights may run."""
