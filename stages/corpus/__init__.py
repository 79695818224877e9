"""From documents to token ids: tokenizers, templates, and what a corpus was made of."""
