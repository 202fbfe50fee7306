"""Holds mixtures of experts: the router, balance, the layer, its statistics."""
