"""A memory of n-grams (Engram) on the source of Python's standard library.

    python -m experiments.pretrain --config=experiments/configs/engram_tiny.py

About two minutes on two CPU cores.
"""

import deepseek_jax as ds
from deepseek_jax import loop, optim, schedules, train
from deepseek_jax.data import DataConfig
from experiments.common import editable


def get_config():
  model = ds.presets.engram_tiny()
  return editable(
    loop.RunConfig(
      model=model,
      data=DataConfig(vocab_size=model.vocab_size, seq_len=256),
      train=train.TrainConfig(
        tokens=4e5,
        batch=schedules.BatchConfig(size=8),
        optimizer=optim.OptimizerConfig(),
        schedule=schedules.ScheduleConfig(peak=3e-3, warmup=20),
      ),
      evaluate=loop.EvaluateConfig(every=100),
      checkpoint_every=0,
    )
  )
