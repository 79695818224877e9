"""Pages that need nothing outside themselves: one file, and a policy that holds a browser to it."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

from ...data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def policy(style: str, script: str | None = None) -> str:
    """A Content-Security-Policy under which this style, this script and nothing else counts."""
    allowed = f"default-src 'none'; base-uri 'none'; form-action 'none'; style-src {_digest(style)}"
    return allowed if script is None else f"{allowed}; script-src {_digest(script)}"


def filled(outline: str, parts: Mapping[str, str]) -> str:
    """A page's outline with every `@@NAME@@` replaced by its part, once: what a part holds is not
    looked at again."""
    return re.sub(r"@@([A-Z]+)@@", lambda found: parts[found[1]], outline)


def expect_file(path: Path) -> None:
    """Raise ColdstillError where a page is to be written and a folder stands."""
    if path.is_dir():
        raise ColdstillError(f"{path}: a folder; name the file that the page is to be")


def _digest(text: str) -> str:
    """How a policy names the one style or script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
