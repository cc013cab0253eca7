"""Data: sources, transforms, the order of samples, loading, shards and caches."""
