"""Runs a worker of these tests in a process of its own, with fake devices.

How many devices a CPU seems to have is settled when JAX starts.
"""

import json
import os
import subprocess
import sys


def run(module: str, *args: str, devices: int = 8) -> dict:
  """What `python -m module *args` prints as JSON in its last line."""
  flags = (
    f'--xla_force_host_platform_device_count={devices}'
    # Compiling is most of the time, so the code may be slow.
    ' --xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true'
  )
  done = subprocess.run(
    [sys.executable, '-m', module, *args],
    env=dict(os.environ, JAX_PLATFORMS='cpu', XLA_FLAGS=flags),
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode:
    raise AssertionError(f'{module} {args}:\n{done.stderr}')
  return json.loads(done.stdout.splitlines()[-1])
