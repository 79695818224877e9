"""The computation of every stage: one file per stage, named after its command."""
