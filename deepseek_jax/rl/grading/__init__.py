"""Scores answers by rules: no model, no network, nothing but Python's library.

What a model writes is data: expressions are parsed and evaluated by our own
code, never by Python's. Scores are computed in a process that may be killed
(`judge`); this package imports nothing heavy, so that it starts fast.
"""
