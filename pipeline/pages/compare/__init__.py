"""Models side by side: their rows and table, curves of training, plots, and a page for all."""
