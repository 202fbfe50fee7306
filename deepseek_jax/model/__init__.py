"""Models: a configuration becomes a pair of pure functions over plain dicts."""
