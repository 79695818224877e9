"""Train a student from a store with the Trainer of transformers.

    python training_with_trainer.py STORE OUT

STORE is a store's folder or address, OUT the folder for checkpoints and the trained student.
"""

import sys

import coldstill
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

store = coldstill.open_store(sys.argv[1])
vocabulary = store.manifest.tokenizer.size
kl = coldstill.losses.loss("kl")


class Distillation(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = inputs["batch"].to(self.args.device)
        outputs = model(**batch.inputs, use_cache=False)
        logits = outputs.logits[..., :vocabulary].flatten(0, 1)[batch.positions]
        loss = kl(logits, batch.targets).mean()
        return (loss, outputs) if return_outputs else loss


config = LlamaConfig(vocab_size=vocabulary, hidden_size=64, intermediate_size=128,
                     num_hidden_layers=2, num_attention_heads=2)  # fmt: skip
arguments = TrainingArguments(sys.argv[2], max_steps=10, learning_rate=1e-3, report_to="none",
                              remove_unused_columns=False)  # fmt: skip
trainer = Distillation(LlamaForCausalLM(config), arguments,
                       train_dataset=coldstill.StoreDataset(store),
                       data_collator=lambda rows: {"batch": coldstill.collate(rows)})  # fmt: skip
trainer.train()
trainer.save_model()
