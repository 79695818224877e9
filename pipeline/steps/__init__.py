"""The steps of a recipe: each makes what is missing and keeps what is there."""
