"""Holds what layers may know of a mesh: sharding, exchanges, collectives."""
