"""A V3-style model on the source code of Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/v3_tiny.py

About four minutes on two CPU cores. It ends with bits per byte on held-out
files beside a uniform guess over the vocabulary and `xz -9`.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.v3_tiny()
