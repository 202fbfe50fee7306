"""V3: sigmoid gates that add up to one.

    python -m experiments.pretrain --workdir=runs/sigmoid \\
      --config=experiments/ladder/07_sigmoid.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('sigmoid', size)
