"""Counts bytes that a training step sends between devices, by cause."""
