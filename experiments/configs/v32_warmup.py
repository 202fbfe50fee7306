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
from deepseek_jax.data import DataConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train
from experiments.common import editable


def get_config():
  model = ds.changed(ds.presets.v32_tiny(), {'attention.stage': 'dense'})
  return editable(
    loop.RunConfig(
      model=model,
      data=DataConfig(vocab_size=model.vocab_size, seq_len=256),
      train=train.TrainConfig(
        tokens=1e5,
        batch=schedules.BatchConfig(size=8),
        schedule=schedules.ScheduleConfig('constant', peak=1e-3, warmup=0),
        trainable=('indexer',),
      ),
    )
  )
