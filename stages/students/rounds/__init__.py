"""Rounds: a student writes text, the teacher scores it, and the student is trained on."""
