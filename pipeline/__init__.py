"""What a person touches: the command line, the recipe, the run folder, progress and tables."""
