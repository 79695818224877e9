"""Everything that is read from disk or written to it. Imports neither the other rooms nor torch."""
