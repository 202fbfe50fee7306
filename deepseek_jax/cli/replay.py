"""Repeats steps of a run: from the checkpoint before them, with their batches.

    python -m experiments.replay --workdir=runs/mine --step=1200

Prints, for every step from the checkpoint to --step, loss and gradient norm as
they were written and as they come now, and of the last one the gradient norm of
each block and the batch that it read. Exits with 1 if they, or the batch of a
step that is in abort.jsonl, differ. One device repeats them: what several wrote
comes back to rounding. Nothing in the run's folder changes.
"""

import json
import sys
from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, experiment_file
from deepseek_jax.run import replay

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_CONFIG = experiment_file.define_flag()
flags.declare_key_flag('config')
_STEP = flags.DEFINE_integer('step', None, 'The step to repeat.', 1)
flags.mark_flags_as_required(['workdir', 'step'])


def main(argv: list[str]) -> None:
  """Prints every repeated step beside what was written."""
  del argv
  experiment_file.load_flag(_CONFIG)
  same = True
  for row in replay.replay(Path(_WORKDIR.value), _STEP.value):
    same &= row.same
    print(
      f'step {row.step}: loss {row.loss!r}, gradient norm {row.grad_norm!r};'
      f' written: {row.written or "nothing"};'
      f' {"same" if row.same else "DIFFERENT"}'
    )
  print('gradient norms:', json.dumps(row.block_norms))
  print('batch:', json.dumps(row.batch))
  sys.exit(not same)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
