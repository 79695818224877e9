"""The parts of stage one: the model, what runs ahead of it, and what runs behind."""
