"""The user interface: the command line, the recipe, the run folder, progress and tables."""
