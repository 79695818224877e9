"""A run on one page, for whoever has a minute: what came of it first, then how and from what."""
