"""Evaluates students on task files with lm-eval, EleutherAI's evaluation harness, offline."""
