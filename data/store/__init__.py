"""One store: its manifest, its commit records, its writer and its reader."""
