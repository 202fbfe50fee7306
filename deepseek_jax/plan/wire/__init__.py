"""Bytes that a training step sends between devices, by cause."""
