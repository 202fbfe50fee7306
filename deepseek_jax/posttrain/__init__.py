"""Chains runs: from text to a model that reasons, with every number kept.

Each stage is a run's folder or a file that is written whole, so the same
command goes on wherever it was ended. `r1` is DeepSeek-R1's pipeline in small,
`evolve` rounds of self-improvement, `study` both with their controls.
"""
