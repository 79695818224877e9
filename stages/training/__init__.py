"""The training loop of teachers and students: what is matched, in which order, where it stands."""
