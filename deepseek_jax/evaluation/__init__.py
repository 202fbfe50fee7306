"""Measures models: pass@k, infilling, multiple choice, bits per byte."""
