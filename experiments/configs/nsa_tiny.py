"""Native sparse attention, from scratch, on Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/nsa_tiny.py

Two minutes on two CPU cores. A query reads compressed blocks, five selected
blocks of 16 tokens and a window of 64, of 256 tokens.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.nsa_tiny()
