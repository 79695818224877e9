"""coldstill: offline distillation of large language models.

The public interface: `open_store(path)` gives a store that has a length, reads any sequences with
their targets (`read`) and yields batches (`batches`). Everything it returns is numpy.
"""

from __future__ import annotations

from .data.errors import ColdstillError
from .data.store.reader import StoreReader, open_store

__version__ = "0.2.0"

__all__ = ["ColdstillError", "StoreReader", "open_store"]
