"""A V4-style model on the source code of Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/v4_tiny.py

Compressed sparse and heavily compressed attention, hyper-connections, hash
routing and Muon; about two minutes on two CPU cores. Documents of a window do
not see each other, as in V4's pre-training.

V4 begins dense and warms its indexers up; so does this, in runs that each
--config.init_from the one before, with

    --config.model.attention.csa.stage=dense
    --config.model.attention.csa.stage=dense \\
      --config.train.trainable="('indexer',)" --config.train.recall_goal=0.9
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.v4_tiny()
