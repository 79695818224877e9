"""Where bytes are: folders of this machine, object stores, the cache of distant shards, and who may
write."""
