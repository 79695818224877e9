"""How students start: new weights, a checkpoint, layers of the teacher, a pruned teacher, LoRA."""
