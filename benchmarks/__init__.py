"""Benchmarks: one runner per question; peers are measured in the same run."""
