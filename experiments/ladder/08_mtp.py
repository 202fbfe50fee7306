"""V3: multi-token prediction, one depth.

    python -m experiments.pretrain --workdir=runs/mtp \\
      --config=experiments/ladder/08_mtp.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('mtp', size)
