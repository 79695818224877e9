"""Exceptions of other libraries reach the user as one line."""

from __future__ import annotations

import errno

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.stages.libraries import asking


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("bad head\nsecond line"), "bad head"),
        (KeyError("falcon"), "KeyError: 'falcon'"),
        (ImportError("install it"), "install it"),
        (AttributeError("  "), "AttributeError"),
        (TypeError("x" * 500), "x" * 196 + " ..."),
        (TypeError("some words, " * 50), "some words, " * 15 + "some words ..."),
        (TypeError("x" * 200 + "."), "x" * 200),
    ],
)
def test_any_exception_of_a_library_becomes_one_line(error: Exception, line: str) -> None:
    with (
        pytest.raises(ColdstillError) as caught,
        asking("peft", "wrap the model", where="students.a.lora", remedy="leave lora out"),
    ):
        raise error
    assert str(caught.value) == (
        f"students.a.lora: peft cannot wrap the model: {line}; leave lora out"
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ColdstillError("a: b"), MemoryError(), OSError(errno.ENOSPC, "no space")]
)
def test_our_errors_memory_errors_and_a_full_disk_pass_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, asking("peft", "wrap", where="x"):
        raise error
    assert caught.value is error
