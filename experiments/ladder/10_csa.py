"""V4: window and compressed entries, CSA and HCA in turn.

    python -m experiments.pretrain --workdir=runs/csa \\
      --config=experiments/ladder/10_csa.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('csa', size)
