"""Runs a module in a process of its own, where a CPU seems to be many devices.

How many there seem to be is settled when JAX starts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(module: str, *args: str, devices: int = 8, seconds: float = 800):
  """What `python -m module ARGS` prints last, as JSON."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  done = subprocess.run(
    [sys.executable, '-m', module, *args],
    cwd=ROOT,
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}',
    },
    capture_output=True,
    text=True,
    timeout=seconds,
  )
  if done.returncode:
    raise AssertionError(f'{module} {args}: {done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])
