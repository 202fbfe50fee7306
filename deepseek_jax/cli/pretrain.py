"""Pretrains a model, validates it, samples from it and writes a report.

    python -m experiments.pretrain --config=experiments/configs/v3_tiny.py \\
      --config.model.moe.top_k=2 --workdir=runs/top2

On several devices say how the run is spread, e.g. --config.mesh.fsdp=2
--config.mesh.expert=4; a started run may go on spread otherwise. Every field
of a configuration is one of the config.json that a run writes.

Under SLURM, Open MPI or Kubernetes all processes of a job make one run (see
launch/); elsewhere name them with --coordinator, --processes and --process.
"""

from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, post_training, process_flags, training
from deepseek_jax.run import fit as loop

_CONFIG = common.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run; a started run goes on from it.'
)
flags.mark_flags_as_required(['config', 'workdir'])
# What other modules define shows in --help, too.
flags.declare_key_flag('config')
flags.adopt_module_key_flags(process_flags)
flags.adopt_module_key_flags(training)


def main(argv: list[str]) -> None:
  """Trains a run and reports it."""
  del argv
  config = common.frozen(loop.RunConfig, _CONFIG.value)
  post_training.check_text(config)
  training.train(config, Path(_WORKDIR.value))


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, join=process_flags.join)
