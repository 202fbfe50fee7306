"""Engram: a table of n-grams before the first experts.

    python -m experiments.pretrain --workdir=runs/engram \\
      --config=experiments/ladder/12_engram.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('engram', size)
