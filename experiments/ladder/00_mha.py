"""Where the ladder stands: SwiGLU and multi-head attention.

    python -m experiments.pretrain --workdir=runs/mha \\
      --config=experiments/ladder/00_mha.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('mha', size)
