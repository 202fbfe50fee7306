"""Whole runs on 8 fake devices: one mesh saves, other meshes go on.

    python -m tests.scale.resume MESH ...

prints losses and final parameters' differences from a run on one device.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.run import fit as loop
from tests.faults import runs
from tests.scale.invariance import gap

STEPS, ROWS = 6, 8
# rows x columns: ways that a batch and that matrices are cut.
MESHES = {
  '1x1': {},
  '2x2': {'mesh.data': 2, 'mesh.tensor': 2},
  '4x2': {'mesh.expert': 4, 'mesh.tensor': 2},
  '8x1': {'mesh.fsdp': 2, 'mesh.expert': 4},
}
SAVED = '4x2'


def config(home: Path, name: str) -> loop.RunConfig:
  # 264: that tensor=2 divides the vocabulary.
  wide = {'train.batch.size': ROWS, 'model.vocab_size': 264}
  steps = STEPS * ROWS // runs.ROWS
  return runs.config(home, steps, **wide, **MESHES[name])


def losses(folder: Path) -> list[float]:
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines]


def fit(home: Path, folder: Path, name: str):
  run = loop.fit(config(home, name), folder, console=False)
  return losses(folder), jax.device_get(run.state)


def against(got, want) -> dict:
  return {
    'steps': len(got[0]),
    'loss': gap(np.array(got[0]), np.array(want[0])),
    'parameters': gap(got[1].params, want[1].params),
    'bias': gap(got[1].buffers, want[1].buffers),
  }


def main(names):
  home = runs.home()
  with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    want = fit(home, scratch / 'one', '1x1')
    saved = fit(home, scratch / 'saved', SAVED)
    out = {SAVED: against(saved, want)}
    for name in names:
      folder = scratch / name
      shutil.copytree(scratch / 'saved', folder)
      shutil.rmtree(folder / 'checkpoints' / str(STEPS))
      out[f'{SAVED} to {name}'] = against(fit(home, folder, name), want)
  print(json.dumps(out))


if __name__ == '__main__':
  main(sys.argv[1:])
