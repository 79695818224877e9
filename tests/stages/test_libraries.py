"""What other libraries raise reaches the user as one line."""

from __future__ import annotations

import errno

import pytest
from coldstill.data.errors import ColdstillError
from coldstill.stages.libraries import asking, first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("bad head\nsecond line"), "bad head"),
        (KeyError("falcon"), "KeyError: 'falcon'"),
        (ImportError("install it"), "install it"),
        (AttributeError(), "AttributeError"),
        (TypeError("x" * 500), "x" * 196 + " ..."),
        (TypeError("some words, " * 50), "some words, " * 15 + "some words ..."),
        (TypeError("x" * 200 + "."), "x" * 200),
    ],
)
def test_any_exception_of_a_library_is_one_line(error: Exception, said: str) -> None:
    with (
        pytest.raises(ColdstillError) as caught,
        asking("peft", "wrap the model", where="students.a.lora", remedy="leave lora out"),
    ):
        raise error
    assert str(caught.value) == (
        f"students.a.lora: peft cannot wrap the model: {said}; leave lora out"
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [ColdstillError("a: b"), MemoryError(), OSError(errno.ENOSPC, "no space")]
)
def test_what_is_no_answer_of_the_library_passes_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, asking("peft", "wrap", where="x"):
        raise error
    assert caught.value is error


def test_an_exception_without_words_is_named_by_its_class() -> None:
    assert first_line(RuntimeError("  ")) == "RuntimeError"
