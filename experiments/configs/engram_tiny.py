"""A memory of n-grams (Engram) on the source of Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/engram_tiny.py

Two minutes on two CPU cores. 2.1 of 7.6 million weights lie in a table of which
a token reads eight rows; the data pipeline hashes n-grams to rows ahead.
"""

import deepseek_jax as ds
from deepseek_jax.data import DataConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.train import optimizer as optim
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train
from experiments.common import editable


def get_config():
  model = ds.presets.engram_tiny()
  return editable(
    loop.RunConfig(
      model=model,
      data=DataConfig(vocab_size=model.vocab_size, seq_len=256),
      train=train.TrainConfig(
        tokens=2e5,
        batch=schedules.BatchConfig(size=8),
        optimizer=optim.OptimizerConfig(),
        schedule=schedules.ScheduleConfig(peak=3e-3, warmup=10),
      ),
    )
  )
