"""V4: manifold-constrained hyper-connections.

    python -m experiments.pretrain --workdir=runs/mhc \\
      --config=experiments/ladder/11_mhc.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('mhc', size)
