"""Makes the stores of students that have other tokens than the teacher, once for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ...data.maintenance import Notify
    from ...data.store.manifest import Manifest


def retokenized(
    path: str, to: str, tokenizer: str, wanted: Mapping[str, Any], where: str, notify: Notify
) -> Manifest:
    """Write a store in the tokens of a tokenizer by name.

    wanted  the options `ambiguous`, `unaligned` and `special`
    where   name of the tokenizer's option in messages

    Raises
        ColdstillError: as `data.maintenance.retokenize.retokenize`; the tokenizer cannot be loaded
    """
    from ...data.maintenance.retokenize import Decisions
    from ...stages.student_tokens import retokenize_for, special_texts, tokenizer_of

    decisions = Decisions(
        ambiguous=wanted["ambiguous"],
        unaligned=wanted["unaligned"],
        special=special_texts(tuple(wanted["special"]), "--special"),
    )
    loaded = tokenizer_of(tokenizer, where)
    return retokenize_for(path, to, loaded, decisions, f"the tokenizer of {tokenizer}", notify)
