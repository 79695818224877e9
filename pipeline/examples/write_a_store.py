"""Write a store from targets that another program computed, here from made-up logits.

    python write_a_store.py TOKENIZER STORE

TOKENIZER is a folder with tokenizer.json, STORE the folder or address of the new store.
"""

import sys

import coldstill
import numpy as np
from tokenizers import Tokenizer

TEXTS = ["A store holds targets.", "Any program can write one.", "Students learn from it."] * 8
HEAD = 4

tokenizer = Tokenizer.from_file(f"{sys.argv[1]}/tokenizer.json")
vocabulary = max(tokenizer.get_vocab().values()) + 1
random = np.random.default_rng(0)

with coldstill.StoreWriter(
    sys.argv[2],
    teacher="made-up",
    tokenizer=sys.argv[1],
    capture=coldstill.Capture(head=HEAD, tail=0),
    sequence_length=64,
) as writer:
    for text in TEXTS:
        token_ids = tokenizer.encode(text).ids[:64]
        # one row of logits per position that has a next token
        logits = 3.0 * random.normal(size=(len(token_ids) - 1, vocabulary))
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        head_ids = np.argsort(-logprobs, axis=1)[:, :HEAD]
        writer.add(
            token_ids,
            head_ids=head_ids,
            head_logprobs=np.take_along_axis(logprobs, head_ids, axis=1),
            label_logprob=logprobs[np.arange(len(logits)), token_ids[1:]],
            entropy=-(np.exp(logprobs) * logprobs).sum(axis=1),
        )
print(f"{len(writer)} sequences in {sys.argv[2]}")
