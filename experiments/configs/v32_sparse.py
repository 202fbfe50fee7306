"""From dense to sparse, stage two: everything learns, attention reads top_k.

    python -m experiments.pretrain --config=experiments/configs/v32_sparse.py \\
      --config.init_from=runs/warmup --workdir=runs/sparse

`init_from` is a run of v32_warmup.py. The indexers learn from their own loss,
over the tokens that they pick; the model learns from its own.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.v32_sparse()
