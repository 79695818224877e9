"""Models and tokenizers: loading, making and naming them; devices, heads and isolation."""
