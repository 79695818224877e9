"""The tokenizer of a store that is not made by stage one: its identity, and its files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .errors import ColdstillError
from .files import tokens_sha256
from .store.manifest import TokenizerIdentity

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "chat_template*",
)  # fmt: skip


def tokenizer_identity(tokenizer: Any, vocabulary: int | None) -> TokenizerIdentity:
    """Fingerprint and size of a tokenizer: a folder, or one of transformers. Raises ColdstillError
    if neither it nor the size is given, or it cannot be read."""
    if tokenizer is None:
        if vocabulary is None:
            raise ColdstillError("StoreWriter: pass a tokenizer, or vocabulary = the token count")
        return TokenizerIdentity(fingerprint="", size=vocabulary)
    if hasattr(tokenizer, "get_vocab"):
        table = tokenizer.get_vocab()
    else:
        from tokenizers import Tokenizer

        file = Path(tokenizer, "tokenizer.json")
        try:
            table = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        except Exception as error:  # the library raises bare exceptions
            raise ColdstillError(f"{file}: cannot be read as a tokenizer: {error}") from error
    size = max(table.values()) + 1
    if vocabulary not in (None, size):
        raise ColdstillError(
            f"StoreWriter: vocabulary = {vocabulary}, but the tokenizer has {size} tokens; leave "
            "one of them out"
        )
    return TokenizerIdentity(fingerprint=tokens_sha256(table), size=size)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer, or copy its files, to a new folder."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
        return
    folder.mkdir()
    for pattern in _TOKENIZER_FILES:
        for file in Path(tokenizer).glob(pattern):
            shutil.copy2(file, folder)
