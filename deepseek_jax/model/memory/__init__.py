"""Holds Engram: tables looked up by hashed n-grams."""
