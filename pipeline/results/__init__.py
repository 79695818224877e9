"""Figures of models as types, the tables made from them, and the facts of a report."""
