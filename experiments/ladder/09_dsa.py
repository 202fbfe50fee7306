"""V3.2: sparse attention to what an indexer picks.

    python -m experiments.pretrain --workdir=runs/dsa \\
      --config=experiments/ladder/09_dsa.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('dsa', size)
