"""V3: loss-free balance: a selection bias in place of the loss.

    python -m experiments.pretrain --workdir=runs/bias \\
      --config=experiments/ladder/06_bias.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('bias', size)
