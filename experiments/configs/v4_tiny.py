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
from deepseek_jax.data import DataConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.train import (
  muon,
  schedules,
)
from deepseek_jax.train import (
  optimizer as optim,
)
from deepseek_jax.train import (
  step as train,
)
from experiments.common import editable


def get_config():
  model = ds.presets.v4_tiny()
  return editable(
    loop.RunConfig(
      model=model,
      data=DataConfig(
        vocab_size=model.vocab_size, seq_len=256, cross_document=False
      ),
      train=train.TrainConfig(
        tokens=1.2e5,
        batch=schedules.BatchConfig(size=8),
        optimizer=optim.OptimizerConfig(eps=1e-20, muon=muon.MuonConfig()),
        schedule=schedules.ScheduleConfig(peak=8e-3, warmup=10),
      ),
      evaluate=loop.EvaluateConfig(every=30),
      checkpoint_every=60,
    )
  )
