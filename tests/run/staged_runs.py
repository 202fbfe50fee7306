"""Whole runs through pipelines on 4 fake devices, ended and gone on with.

    python -m tests.run.staged_runs

prints, per mesh, differences from the run on one device; and for runs that go
on elsewhere from the checkpoint in the middle.
"""

import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from deepseek_jax.record import metrics
from deepseek_jax.run import fit as loop
from deepseek_jax.run.checkpoint import flatten
from tests.faults import runs
from tests.run.staged_worker import gap

STEPS, SIZE = 6, 8
MESHES = {
  'one': {},
  '2 stages': {'mesh.stage': 2},
  '2 stages x 2 experts': {'mesh.stage': 2, 'mesh.expert': 2},
  'dualpipe': {'mesh.stage': 2, 'mesh.schedule': 'dualpipe'},
}
# From where, to where.
MOVES = (
  ('2 stages', '2 stages'),
  ('dualpipe', 'dualpipe'),
  ('2 stages', 'one'),
  ('one', '2 stages x 2 experts'),
  ('2 stages x 2 experts', 'dualpipe'),
)


def fit(home: Path, folder: Path, name: str) -> loop.Run:
  config = runs.config(
    home,
    STEPS * SIZE // runs.ROWS,
    **{
      'model.layout': ((('dense', 'moe'), 1),),
      'model.mtp.depth': 1,
      'train.batch': {'size': SIZE, 'accumulate': 4},
      'evaluate.every': 2,
      'evaluate.documents': 2,
    },
    **MESHES[name],
  )
  return loop.fit(config, folder, console=False)


def numbers(folder: Path, key: str) -> np.ndarray:
  return np.array([r[key] for r in metrics.read(folder) if key in r])


def against(folder, run, other, want) -> dict:
  """Two runs: folders and what `fit` returned."""
  a, b = flatten(run.state), flatten(want.state)
  bits = lambda name: (name / 'metrics.jsonl').read_bytes()
  equal = all(np.array_equal(a[name], b[name]) for name in b)
  rows = {
    key: gap(numbers(folder, key), numbers(other, key))
    for key in ('loss', 'grad_norm', 'validation_bits_per_byte')
  }
  return {
    **rows,
    'steps': len(numbers(folder, 'loss')),
    'parameters': gap(run.state.params, want.state.params),
    'bias': gap(run.state.buffers, want.state.buffers),
    'bits': list(a) == list(b) and equal and bits(folder) == bits(other),
  }


def main():
  home, out = runs.home(), {}
  # Each mesh compiles once, though its runs are several.
  jax.config.update('jax_compilation_cache_dir', str(home / 'programs'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  with tempfile.TemporaryDirectory() as scratch:
    scratch = Path(scratch)
    straight = {name: fit(home, scratch / name, name) for name in MESHES}
    for name, run in straight.items():
      out[name] = against(scratch / name, run, scratch / 'one', straight['one'])
    for start, end in MOVES:
      folder = scratch / f'{start} to {end}'
      shutil.copytree(scratch / start, folder)
      shutil.rmtree(folder / 'checkpoints' / str(STEPS))
      run = fit(home, folder, end)
      other = start if start == end else 'one'
      out[folder.name] = against(folder, run, scratch / other, straight[other])
  print(json.dumps(out))


if __name__ == '__main__':
  main()
