"""Engram: memory looked up by hashed n-grams."""
