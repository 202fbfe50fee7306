"""Runs a module on fake devices, for a process has as many as it began with."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEVICES = 8


def call(module: str, *args: str, seconds: float = 800):
  """What `python -m module ARGS` prints last, as JSON."""
  flags = f'--xla_force_host_platform_device_count={DEVICES}'
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {flags}',
  }
  done = subprocess.run(
    [sys.executable, '-m', module, *args],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    timeout=seconds,
  )
  if done.returncode:
    raise AssertionError(f'{module} {args}: {done.stderr[-4000:]}')
  return json.loads(done.stdout.splitlines()[-1])
