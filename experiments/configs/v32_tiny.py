"""A V3.2-style model from scratch: sparse attention from the first step.

    python -m experiments.pretrain --config=experiments/configs/v32_tiny.py

Two minutes on two CPU cores. `recall` in the metrics is the share of dense
attention's mass that the indexer's 64 of 256 tokens have.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.v32_tiny()
