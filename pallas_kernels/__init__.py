"""Kernels for Hopper with an XLA reference for every backend.

One folder per operation; each holds one plain function that takes
`impl=None | 'reference' | 'gpu'`. The package needs jax and numpy alone.
"""
