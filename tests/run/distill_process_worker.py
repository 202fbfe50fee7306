"""Learns of a teacher's run as one process of some.

By distillation on own answers, from the teacher's weights, or by reinforcement
with the teacher as the reference.

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
_WAY = flags.DEFINE_enum(
  'way', 'distill', ['distill', 'init_from', 'reference'], 'What it learns by.'
)
flags.adopt_module_key_flags(worker)


def main(argv):
  del argv
  folder = _TAUGHT.value
  within = lambda name: os.path.join(folder, name)
  made = distill_mesh_worker.config(folder, ds.MeshConfig(), True)
  if _WAY.value == 'init_from':
    made = taught.config(within('chats.jsonl'), init_from=within('teacher'))
  if _WAY.value == 'reference':
    objective = ds.GRPOConfig(kl='k3', kl_weight=0.1)
    reference = {'rollouts.reference': within('teacher')}
    made = ds.changed(made, {'objective': objective, **reference})
  steps = {'train.tokens': 24 * 8 * 4.0, 'checkpoint_every': 0}
  ds.fit(ds.changed(made, steps), flags.FLAGS.workdir, console=False)


if __name__ == '__main__':
  common.launch(main, join=process_flags.join)
