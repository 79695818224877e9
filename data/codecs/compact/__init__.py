"""The codec `compact`."""
