"""Pretrains a model, validates it, samples from it and writes a report.

    python -m experiments.pretrain --config=experiments/configs/v3_tiny.py \\
      --config.model.moe.top_k=2 --workdir=runs/top2
"""

from pathlib import Path

from absl import flags

from deepseek_jax import loop
from experiments import common, finish

_CONFIG = common.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a started run goes on from it.'
)
flags.mark_flags_as_required(['config', 'workdir'])


def main(argv):
  del argv
  config = common.frozen(loop.RunConfig, _CONFIG.value)
  run = loop.fit(config, _WORKDIR.value)
  finish.finish(run, Path(_WORKDIR.value))


if __name__ == '__main__':
  common.launch(main)
