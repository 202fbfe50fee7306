"""Native sparse attention, from scratch, on Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/nsa_tiny.py

Two minutes on two CPU cores. A query reads compressed blocks, five selected
blocks of 16 tokens and a window of 64, of 256 tokens.
"""

import deepseek_jax as ds
from deepseek_jax.data import DataConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.train import optimizer as optim
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train
from experiments.common import editable


def get_config():
  model = ds.presets.nsa_tiny()
  return editable(
    loop.RunConfig(
      model=model,
      data=DataConfig(vocab_size=model.vocab_size, seq_len=256),
      train=train.TrainConfig(
        tokens=1.2e5,
        batch=schedules.BatchConfig(size=8),
        optimizer=optim.OptimizerConfig(),
        schedule=schedules.ScheduleConfig(peak=3e-3, warmup=10),
      ),
    )
  )
