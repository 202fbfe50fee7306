"""Distillation of a dense student, in bytes.

    python -m experiments.distill --workdir=runs/student \\
      --config=experiments/configs/distill_tiny.py --teacher=runs/rl \\
      --config.data.path=chats.jsonl

With --config.rollouts the student answers a task itself; see cli/distill.py.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.distill_tiny()
