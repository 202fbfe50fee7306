"""DeepSeekMoE: fine-grained experts: as wide together, more to choose from.

    python -m experiments.pretrain --workdir=runs/fine \\
      --config=experiments/ladder/03_fine.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('fine', size)
