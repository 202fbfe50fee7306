"""Builds models: a configuration becomes pure functions over plain dicts."""
