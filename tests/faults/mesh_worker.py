"""Saves a state from one mesh of 8 devices and reads it on others.

    python -m tests.faults.mesh_worker HOME WORKDIR

The last line is JSON: per mesh how many arrays came back bit for bit, of how
many, and over how many devices the most spread one lies.
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np

import deepseek_jax as ds
from deepseek_jax.parallel import placement
from deepseek_jax.run import fit as loop
from deepseek_jax.run.checkpoint import Checkpoints, flatten
from tests.faults import runs

MESHES = ((4, 2), (1, 1), (2, 2), (8, 1))


def main(home: Path, workdir: Path) -> None:
  config = runs.config(home)
  model = ds.build(config.model)
  fresh = functools.partial(loop.fresh_state, config, model)

  def where(fsdp: int, expert: int):
    sizes = {'mesh.fsdp': fsdp, 'mesh.expert': expert}
    return placement.choose(ds.changed(config, sizes).mesh, model.abstract)

  state = where(*MESHES[0]).make(fresh, model.abstract)
  want = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
  found = {}
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save(1, state, {'next_index': 4}, {}, wait=True)
    for shape in MESHES:
      like = where(*shape).abstract(fresh, model.abstract)
      got = flatten(checkpoints.restore(1, like).state)
      same = [np.array_equal(got[name], want[name]) for name in want]
      spread = [
        len({str(s.index) for s in a.addressable_shards} if a.ndim else {0})
        for a in got.values()
      ]
      found['x'.join(map(str, shape))] = sum(same), len(want), max(spread)
  print(json.dumps(found))


if __name__ == '__main__':
  assert jax.device_count() == 8
  main(*map(Path, sys.argv[1:]))
