"""What a processor does: one file per stage, named as its command."""
