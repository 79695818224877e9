"""Reads documents from files, folders, saved datasets, hubs, and the standard library."""

from __future__ import annotations

from .bad_rows import REASONS, BadRowError, refuse
from .columns import Columns
from .document import Document, is_held_out
from .folders import note_left_out
from .formats import read_documents
from .records import Reading
from .sources import Source, list_sources

__all__ = [
    "REASONS",
    "BadRowError",
    "Columns",
    "Document",
    "Reading",
    "Source",
    "is_held_out",
    "list_sources",
    "note_left_out",
    "read_documents",
    "refuse",
]
