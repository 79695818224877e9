"""Keeps libraries from printing, so that a command prints its own lines only."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def quiet_imports() -> None:
    """Silence libraries that print while they are imported; imports nothing itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # transformers imports torchao if it is installed, which reports every GPU that it does not find
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silence transformers and huggingface_hub, and turn their progress bars off."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as model_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model_logging.set_verbosity_error()
    model_logging.disable_progress_bar()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence these libraries within the context, and restore their settings afterwards."""
    quiet_imports()
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as model_logging

    hub, models = hub_logging.get_verbosity(), model_logging.get_verbosity()
    shows_bars = model_logging.is_progress_bar_enabled()
    quiet_libraries()
    try:
        yield
    finally:
        hub_logging.set_verbosity(hub)
        model_logging.set_verbosity(models)
        if shows_bars:
            model_logging.enable_progress_bar()
