"""The page of a comparison: tables, learning curves and plots of all models."""
