"""Where bytes are stored: folders, object stores, the cache of shards, and locks for writers."""
