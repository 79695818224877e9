"""Models and tokenizers: loading, building, identity, output head, isolation, end tokens."""
