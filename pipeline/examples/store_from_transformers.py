"""Write a store from a teacher in your own loop, here one of transformers.

    python store_from_transformers.py TEACHER STORE

TEACHER is a folder or a name of a model, STORE the folder or address of the new store. The script
can be interrupted and run again.
"""

import sys

import coldstill
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["A store holds targets.", "Any program can write one.", "Students learn from it."] * 8

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
vocabulary = max(tokenizer.get_vocab().values()) + 1

with coldstill.StoreWriter(
    sys.argv[2],
    teacher=sys.argv[1],
    tokenizer=tokenizer,
    capture=coldstill.Capture(head=4, tail=16),
    sequence_length=64,
    resume=True,
) as writer:
    for text in TEXTS[len(writer) :]:
        token_ids = tokenizer(text)["input_ids"][:64]
        with torch.no_grad():
            # the last token has no next one; rows past the vocabulary are padding
            logits = teacher(torch.tensor([token_ids])).logits[0, :-1, :vocabulary]
        writer.add(token_ids, logprobs=logits.double().log_softmax(1).numpy())
print(f"{len(writer)} sequences in {sys.argv[2]}")
