"""Fine-tuning on conversations, in bytes.

    python -m experiments.sft --config=experiments/configs/sft_tiny.py \\
      --workdir=runs/sft --config.data.path=conversations.jsonl

A line of the file is {"prompt": "...", "completion": "..."} or
{"messages": [...]}. What is learnt of the first examples is drawn before the
run. `--config.init_from=runs/NAME` begins with the weights of a run.
"""

import deepseek_jax as ds


def get_config() -> ds.RunConfig:
  return ds.recipes.sft_tiny()
