"""Writes and reads what a run reached: results.json beside its config.json."""

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from deepseek_jax import files
from deepseek_jax.version import __version__

FILE = 'results.json'
EVALUATIONS = 'evaluations'  # a list of what `evaluate` measured
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'orbax-checkpoint')


def write(workdir: Path, values: Mapping[str, Any]) -> Path:
  """Writes a run's results, whole or not at all; returns their path."""
  path = workdir / FILE
  with files.whole(path) as scratch:
    text = json.dumps(_finite(values), indent=2, allow_nan=False)
    scratch.write_text(f'{text}\n', encoding='utf-8')
  return path


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns values as `write` stores them and `read` gives them back."""
  return json.loads(json.dumps(_finite(values), allow_nan=False))


def _finite(value: Any) -> Any:
  """Returns values with 'nan' and 'inf' as texts: JSON has no such number."""
  if isinstance(value, Mapping):
    return {name: _finite(inner) for name, inner in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def read(workdir: Path) -> dict[str, Any] | None:
  """Returns what a run reached, or None where it has not ended.

  Raises:
    InputError: the file holds no JSON object.
  """
  found = whole(workdir)
  return found if found.keys() - {EVALUATIONS} else None


def whole(workdir: Path) -> dict[str, Any]:
  """Returns all that the file holds, {} without one.

  A run that has not ended may have evaluations alone.

  Raises:
    InputError: it holds no JSON object.
  """
  path = workdir / FILE
  return files.load_json(str(path)) if path.exists() else {}


def versions() -> dict[str, str]:
  """Returns the versions that numbers depend on: Python, ours, packages."""
  found = {'python': platform.python_version(), 'deepseek_jax': __version__}
  for name in _PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def machine() -> dict[str, Any]:
  """Returns the devices of a run and when it ended."""
  device = jax.local_devices()[0]
  return {
    'platform': device.platform,
    'device': device.device_kind,
    'devices': jax.device_count(),
    'ended': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
  }


def peak_memory() -> int | None:
  """Returns the most bytes that the run held: of a device, else the process.

  None where nothing tells.
  """
  peaks = [
    (device.memory_stats() or {}).get('peak_bytes_in_use')
    for device in jax.local_devices()
  ]
  known = [peak for peak in peaks if peak]
  if known:
    return max(known)
  try:
    import resource
  except ImportError:  # no POSIX system
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak


def git_state(folder: Path) -> dict[str, Any] | None:
  """Returns commit and whether files differ from it; None outside of git."""

  def ask(*words: str) -> str | None:
    try:
      done = subprocess.run(
        ['git', '-C', str(folder), *words],
        capture_output=True,
        text=True,
        timeout=10,
      )
    except (OSError, subprocess.SubprocessError):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  commit = ask('rev-parse', 'HEAD')
  if not commit:
    return None
  return {'commit': commit, 'changed': bool(ask('status', '--porcelain'))}
