"""Where text comes from: files, folders, saved datasets, hubs, and this Python's own sources."""

from __future__ import annotations

from .document import Document, is_held_out

__all__ = ["Document", "is_held_out"]
