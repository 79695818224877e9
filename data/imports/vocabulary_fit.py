"""Whether a source's token ids were made with a tokenizer, by the text that they give.

Ids of another tokenizer decode to words in an impossible order, cut in other places than the
tokenizer would cut them. So the text is tokenised again: the right tokenizer gives the ids back.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ColdstillError, first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SHARE = 0.8
"""The smallest share of the ids that tokenising their text must give back. (Measured: 0.97 to 1.00
with the right tokenizer, 0.2 to 0.6 with another one.)"""
_FEW = 32
"""The fewest tokens that decide."""


def share_given_back(tokenizer: Any, documents: Sequence[NDArray[Any]]) -> tuple[float, int]:
    """The share of the ids that tokenising their text gives back, and their number.

    tokenizer  of the package `tokenizers`
    documents  [T] token ids of each
    """
    same = total = 0
    for ids_T in documents:
        ids = ids_T.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False)
        again = tokenizer.encode(text, add_special_tokens=False).ids
        same += (Counter(ids) & Counter(again)).total() if _in_order(ids, again) else 0
        total += len(ids)
    return same / max(1, total), total


def _in_order(ids: list[int], again: list[int]) -> bool:
    """Whether two lists have about the same length: else equal ids are a matter of chance."""
    return abs(len(ids) - len(again)) <= 2 + len(ids) // 5


def expect_tokenizer(tokenizer: Any, documents: Sequence[NDArray[Any]], where: str) -> float:
    """Refuse a tokenizer that does not give the ids back. Returns the share that it does. Raises
    ColdstillError (the share)."""
    share, total = share_given_back(tokenizer, documents)
    if total >= _FEW and share < _SHARE:
        raise ColdstillError(
            f"{where}: --tokenizer is not the one of these tokens: tokenising their text gives "
            f"{share:.0%} of {total:,} ids back; name the teacher's tokenizer"
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
