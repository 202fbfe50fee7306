"""The task of killed rounds, and what says that two states are equal.

Without flags: tests may import it beside any worker.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from deepseek_jax.run.checkpoint import flatten


def fingerprint(state) -> str:
  """SHA-256 of all names and bits of a state."""
  digest = hashlib.sha256()
  for name, leaf in flatten(state).items():
    digest.update(name.encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def folder_of(home: Path) -> Path:
  """Returns the folder of the task."""
  return home / 'rollouts'


def write_task(folder: Path) -> None:
  """Writes problems whose answers should begin with a small byte."""
  folder.mkdir(exist_ok=True)
  own = folder / 'own.py'
  own.write_text(
    'def score(text, problem):\n'
    '  if text[:1] == "q": raise ValueError("q")\n'
    '  return float(text[:1] < "P")\n'
  )
  lines = [json.dumps({'prompt': f'p{n}'}) for n in range(30)]
  (folder / 'problems.jsonl').write_text('\n'.join(lines))
  rewards = [{'kind': 'own', 'file': str(own)}]
  spec = {'problems': 'problems.jsonl', 'rewards': rewards, 'heldout': 0.1}
  (folder / 'task.json').write_text(json.dumps(spec))
