"""From dense to sparse, stage one: the indexer learns to imitate attention.

    python -m experiments.pretrain --config=experiments/configs/v32_warmup.py \\
      --config.init_from=runs/demo --workdir=runs/warmup

`init_from` is a run of v3_tiny.py. All but the indexers is frozen, router
biases too, and attention stays dense. The stage ends after its tokens, or
earlier with --config.train.recall_goal=0.9, once the indexers' 64 tokens have
so much of dense attention's mass. v32_sparse.py goes on from here.

Each stage reads the corpus from its start, in the order that data.seed gives:
another --config.data.seed is text in another order.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.v32_warmup()
