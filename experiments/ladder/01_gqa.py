"""Llama 3: several queries share a key head.

    python -m experiments.pretrain --workdir=runs/gqa \\
      --config=experiments/ladder/01_gqa.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('gqa', size)
