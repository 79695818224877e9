"""Results as typed rows and facts: figures of models, tables, and what limits a comparison."""
