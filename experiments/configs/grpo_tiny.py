"""Reinforcement on a task, in bytes.

    python -m experiments.grpo --config=experiments/configs/grpo_tiny.py \\
      --workdir=runs/rl --config.data.path=task.json --config.init_from=runs/sft

A task is {"problems": {"maker": "addition", "count": 2000},
"rewards": [{"kind": "exact", "place": "all"}]}; see deepseek_jax/rl.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.grpo_tiny()
