"""What is true on disk. Imports no other room and never torch."""
