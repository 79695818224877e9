"""Structured pruning: a smaller model of the same class, cut out of a larger one."""
