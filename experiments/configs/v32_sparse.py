"""From dense to sparse, stage two: everything learns, attention reads top_k.

    python -m experiments.pretrain --config=experiments/configs/v32_sparse.py \\
      --config.init_from=runs/warmup --workdir=runs/sparse

`init_from` is a run of v32_warmup.py. The indexers learn from their own loss,
over the tokens that they pick; the model learns from its own.
"""

import deepseek_jax as ds
from deepseek_jax.data import DataConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.train import schedules
from deepseek_jax.train import step as train
from experiments.common import editable


def get_config():
  model = ds.presets.v32_tiny()
  return editable(
    loop.RunConfig(
      model=model,
      data=DataConfig(vocab_size=model.vocab_size, seq_len=256),
      train=train.TrainConfig(
        tokens=1e5,
        batch=schedules.BatchConfig(size=8),
        schedule=schedules.ScheduleConfig('constant', peak=1e-4, warmup=0),
        mtp_weight=schedules.SwitchConfig(0.1, 0.1, 0.5),
        bias_rate=schedules.SwitchConfig(0.0, 0.0, 0.5),
      ),
    )
  )
