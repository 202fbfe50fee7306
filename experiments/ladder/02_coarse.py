"""Before DeepSeekMoE: conventional experts in place of the dense FFN.

    python -m experiments.pretrain --workdir=runs/coarse \\
      --config=experiments/ladder/02_coarse.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('coarse', size)
