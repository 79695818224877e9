"""Where text comes from: files, folders, saved datasets, hubs, and this Python's own sources."""

from __future__ import annotations

from .columns import Columns
from .document import Document, is_held_out
from .formats import read_documents
from .sources import Source, list_sources

__all__ = ["Columns", "Document", "Source", "is_held_out", "list_sources", "read_documents"]
