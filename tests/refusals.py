"""Errors for the user, which are always one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from coldstill.data.errors import ColdstillError

if TYPE_CHECKING:
    from collections.abc import Callable


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The message of the error that a call raises."""
    with pytest.raises(ColdstillError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
