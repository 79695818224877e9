"""Train a student from a store with plain PyTorch.

    python training_loop.py STORE OUT

STORE is a store's folder or address, OUT the folder for the trained student.
"""

import sys

import coldstill
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

store = coldstill.open_store(sys.argv[1])
vocabulary = store.manifest.tokenizer.size
config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128,
                     num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
kl = coldstill.losses.loss("kl")

dataset = coldstill.StoreDataset(store)
for epoch in range(2):
    order = dataset.order(seed=0, epoch=epoch).tolist()
    for batch in DataLoader(dataset, 8, sampler=order, collate_fn=coldstill.collate):
        logits = model(**batch.inputs, use_cache=False).logits[..., :vocabulary]
        loss = kl(logits.flatten(0, 1)[batch.positions], batch.targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: last loss {loss.item():.4f}")
model.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(store.tokenizer_folder()).save_pretrained(sys.argv[2])
