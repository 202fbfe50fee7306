"""DeepSeekMoE: some of the experts are shared by all tokens.

    python -m experiments.pretrain --workdir=runs/shared \\
      --config=experiments/ladder/04_shared.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('shared', size)
