"""The report of a run on one page: the result first, then its figures, plots and records."""
