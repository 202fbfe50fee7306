"""V2: multi-head latent attention.

    python -m experiments.pretrain --workdir=runs/mla \\
      --config=experiments/ladder/05_mla.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('mla', size)
