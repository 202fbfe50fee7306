"""V4: Muon updates the matrices in place of AdamW.

    python -m experiments.pretrain --workdir=runs/muon \\
      --config=experiments/ladder/13_muon.py:half_hour
    python -m experiments.ladder --arms=experiments/ladder --folder=runs/ladder
"""

import deepseek_jax as ds


def get_config(size: str = 'half_hour') -> ds.RunConfig:
  return ds.ladder.config('muon', size)
