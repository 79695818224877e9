"""Scripts that run a recipe on a cluster or on machines of a cloud."""
