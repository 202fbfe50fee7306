"""Writes the report of a run: one HTML page without external scripts."""
