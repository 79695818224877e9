"""The training loop of teachers and students: batches, objective, order and checkpoints."""
