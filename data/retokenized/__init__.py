"""Two tokenizers over the same bytes: spelling, the table of first tokens, chunks, and records."""
