"""Launch configurations: defaults, measuring, and the cache on disk."""
