"""A tiny run of 4 devices as one process of several.

    python -m tests.scale.worker --home=... --workdir=... --processes=2 ...

Process 0 ends with one JSON line: the losses of all steps.
"""

import json
from pathlib import Path

from absl import flags

from deepseek_jax.cli import common, process_flags
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run import fit as loop
from tests.faults import runs
from tests.scale import resume

_HOME = flags.DEFINE_string('home', None, 'Folder with the corpus.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_SPREAD = flags.DEFINE_bool('spread', True, 'Over 4 devices, else over 1.')
STEPS = 4
MESH = {'mesh.data': 2, 'mesh.expert': 2}


def main(argv):
  del argv
  changes = MESH if _SPREAD.value else {}
  config = runs.config(Path(_HOME.value), STEPS, **changes)
  loop.fit(config, _WORKDIR.value, console=False)
  if distributed.first():
    print(json.dumps(resume.losses(Path(_WORKDIR.value))), flush=True)


if __name__ == '__main__':
  common.launch(main, join=process_flags.join)
