"""Write a store whose teacher is no neural network: counts of pairs of tokens, in numpy.

    python store_from_ngrams.py TOKENIZER STORE

TOKENIZER is a folder with tokenizer.json, STORE the folder or address of the new store.
"""

import sys

import coldstill
import numpy as np
from tokenizers import Tokenizer

TEXTS = ["A store holds targets.", "Any program can write one.", "Students learn from it."] * 8

tokenizer = Tokenizer.from_file(f"{sys.argv[1]}/tokenizer.json")
vocabulary = max(tokenizer.get_vocab().values()) + 1
documents = [np.array(tokenizer.encode(text).ids) for text in TEXTS]
counts = np.full((vocabulary, vocabulary), 1e-3)
for tokens in documents:
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1.0)
logprobs = np.log(counts / counts.sum(axis=1, keepdims=True))

with coldstill.StoreWriter(
    sys.argv[2],
    teacher="pairs of tokens",
    tokenizer=sys.argv[1],
    capture=coldstill.Capture(head=2, tail=12, temperatures=(2.0,)),
    sequence_length=64,
) as writer:
    for tokens in documents:
        tokens = tokens[:64]
        writer.add(tokens, logprobs=logprobs[tokens[:-1]])  # what follows each token
print(f"{len(writer)} sequences in {sys.argv[2]}")
