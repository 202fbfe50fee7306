"""Learns of a teacher's run as one process of some.

By distillation on own answers, or with --warm from the teacher's weights.

python -m tests.run.distill_process_worker --taught=... --workdir=...
"""

import os

from absl import flags

import deepseek_jax as ds
from deepseek_jax.cli import common, process_flags
from tests.faults import worker
from tests.rl import taught
from tests.run import distill_mesh_worker

_TAUGHT = flags.DEFINE_string('taught', None, 'Folder with task and teacher.')
_WARM = flags.DEFINE_bool('warm', False, 'Go on from the teacher.')
flags.adopt_module_key_flags(worker)


def main(argv):
  del argv
  folder = _TAUGHT.value
  made = distill_mesh_worker.config(folder, ds.MeshConfig(), True)
  if _WARM.value:
    chats, source = (
      os.path.join(folder, n) for n in ('chats.jsonl', 'teacher')
    )
    made = taught.config(chats, init_from=source)
  steps = {'train.tokens': 24 * 8 * 4.0, 'checkpoint_every': 0}
  ds.fit(ds.changed(made, steps), flags.FLAGS.workdir, console=False)


if __name__ == '__main__':
  common.launch(main, join=process_flags.join)
