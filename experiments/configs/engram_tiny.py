"""A memory of n-grams (Engram) on the source of Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/engram_tiny.py

Two minutes on two CPU cores. 2.1 of 7.6 million weights lie in a table of which
a token reads eight rows; the data pipeline hashes n-grams to rows ahead.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.engram_tiny()
