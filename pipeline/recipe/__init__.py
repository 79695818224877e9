"""Recipes: their tables and keys, how one is read, and the paths of the run that it makes."""
