"""Turning documents into token ids: chat templates, tokenising, splits, provenance, estimates."""
