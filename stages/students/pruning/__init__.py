"""Structured pruning: cuts a smaller model of the same class out of a larger one."""
