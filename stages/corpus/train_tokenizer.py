"""Training a byte-pair tokenizer on the corpus, for teachers that are built from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ...data.corpus.document import refuse
from ...data.corpus.formats import read_documents
from ...data.corpus.sources import list_sources
from ...data.errors import ColdstillError
from ...data.files import whole_folder
from ..report import Report, Reporter, silent
from .tokenize_documents import split_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..config import CorpusConfig, TokenizerConfig

STAGE = "tokenizer"
END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(
    folder: Path,
    config: TokenizerConfig,
    corpus: CorpusConfig,
    base: Path,
    report: Reporter = silent,
) -> Any:
    """Train merges on the training split and save the tokenizer in `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus, base, report), trainer)
    size = tokenizer.get_vocab_size()
    if size < config.vocabulary:
        raise ColdstillError(
            f"teacher.tokenizer.vocabulary: the corpus gives only {size} tokens, expected "
            f"{config.vocabulary}; set it to at most {size}"
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    with whole_folder(folder) as scratch:
        fast.save_pretrained(scratch)
    report(Report(stage=STAGE, note=f"{size:,} tokens learned"))
    return fast


def _texts(corpus: CorpusConfig, base: Path, report: Reporter) -> Iterator[str]:
    report(Report(stage=STAGE, unit="documents"))
    sources = list_sources(corpus.files, base)
    # preparing the corpus counts the skipped rows
    skip = (lambda bad: None) if corpus.bad_rows == "skip" else refuse
    for count, document in enumerate(read_documents(sources, corpus.columns, skip), 1):
        report(Report(stage=STAGE, done=count, unit="documents"))
        if not document.is_empty and split_of(document, corpus.holdout) == "train":
            yield from (document.prompt, document.text, *document.contents())
    report(Report(stage=STAGE, doing="learn the merges"))
