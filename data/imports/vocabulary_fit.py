"""Whether a source's token ids were made with a tokenizer, by the text that they give.

Ids of another tokenizer decode to words in an impossible order, cut in other places than the
tokenizer would cut them. So the text is tokenised again: the right tokenizer gives the ids back.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SHARE = 0.95
"""The smallest share of pairs of ids that tokenising their text must give back. (Measured: 0.996 to
1.000 with the right tokenizer; 0.90 with a random permutation of its ids, since most tokens are
whole words; 0.56 to 0.90 with another one.)"""
_FEW = 64
"""The fewest pairs that decide."""


def share_given_back(tokenizer: Any, documents: Sequence[NDArray[Any]]) -> tuple[float, int]:
    """The share of pairs of neighbouring ids that tokenising their text gives back; their number.

    tokenizer  of the package `tokenizers`
    documents  [T] token ids of each
    """
    same = total = 0
    for ids_T in documents:
        ids = ids_T.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        again = tokenizer.encode(text, add_special_tokens=False).ids
        same += (_pairs(ids) & _pairs(again)).total()
        total += max(0, len(ids) - 1)
    return same / max(1, total), total


def _pairs(ids: list[int]) -> Counter[tuple[int, int]]:
    return Counter(itertools.pairwise(ids))


def expect_tokenizer(
    tokenizer: Any, documents: Sequence[NDArray[Any]], where: str, *, accept: bool
) -> float:
    """The share of `share_given_back`. Raises ColdstillError if it is too small.

    accept  do not refuse: the text was not made by the tokenizer, or was changed
    """
    share, total = share_given_back(tokenizer, documents)
    if total >= _FEW and share < _SHARE and not accept:
        raise ColdstillError(
            f"{where}: --tokenizer is not the one of these tokens: tokenising their text gives "
            f"{share:.1%} of {total:,} pairs of ids back, expected {_SHARE:.0%}; name the "
            "teacher's tokenizer, or accept the text with --accept-text"
        )
    return share


def backend_of(tokenizer: Any) -> Any:
    """The tokenizer of the package `tokenizers` in a folder, or inside one of transformers. Raises
    ColdstillError if the folder has none that can be read."""
    if hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer.backend_tokenizer
    from tokenizers import Tokenizer

    file = Path(tokenizer, "tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare exceptions
        raise ColdstillError(
            f"{file}: cannot be read as a tokenizer: {first_line(error)}"
        ) from error
