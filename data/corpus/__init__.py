"""Reads documents from files, folders, saved datasets, hubs, and the standard library."""
