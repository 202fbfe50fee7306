"""Starts workers as processes, lonely or several as one run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults import runs

ROOT = Path(__file__).parents[2]
HEARTBEAT = 10  # seconds


class Worker(NamedTuple):
  process: subprocess.Popen
  output: Path

  def said(self) -> str:
    return self.output.read_text()


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def identity(found_by: str, count: int, index: int, port: int):
  """How a process learns who it is -> (flags, environment)."""
  if found_by == 'slurm':  # as srun sets it
    return [], {
      'SLURM_JOB_ID': '7',
      'SLURM_NTASKS': str(count),
      'SLURM_PROCID': str(index),
      'SLURM_LOCALID': str(index),
      'SLURM_STEP_NODELIST': 'localhost',
      'SLURM_STEP_NUM_NODES': '1',
      'JAX_COORDINATOR_PORT': str(port),
    }
  coordinator = f'127.0.0.1:{port}'
  if found_by == 'environment':
    return [], {
      'DSJ_COORDINATOR': coordinator,
      'DSJ_PROCESSES': str(count),
      'DSJ_PROCESS': str(index),
    }
  given = {'coordinator': coordinator, 'processes': count, 'process': index}
  return [f'--{name}={value}' for name, value in given.items()], {}


def start(
  workdir: Path,
  *flags: str,
  count: int = 1,
  devices: int = 1,
  found_by: str = 'arguments',
  last: Sequence[str] = (),
  homes: Sequence[Path] = (),
  module: str = 'tests.faults.worker',
) -> list[Worker]:
  """`count` processes of one run, each with `devices` devices.

  `last` are flags of the last process alone, `homes` what ~ is in each.
  """
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_COMPILATION_CACHE_DIR': str(runs.home() / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  command = [sys.executable, '-m', module, *flags]
  command += [f'--home={runs.home()}', f'--workdir={workdir}']
  command += [f'--heartbeat={HEARTBEAT}']
  workers, port = [], free_port()
  for index in range(count):
    output = workdir.with_name(f'{workdir.name}.{index}.log')
    own, variables = [], {}
    if count > 1:
      own, variables = identity(found_by, count, index, port)
    own += last if index == count - 1 else ()
    variables |= {'HOME': str(homes[index])} if homes else {}
    with output.open('w') as log:
      process = subprocess.Popen(
        command + own,
        cwd=ROOT,
        env=environment | variables,
        stdout=log,
        stderr=log,
      )
    workers.append(Worker(process, output))
  return workers


def end(workers: Sequence[Worker], seconds: float = 200) -> list[int]:
  """Exit codes, when all have ended; those that never end are killed."""
  until = time.monotonic() + seconds
  try:
    return [w.process.wait(max(until - time.monotonic(), 0.1)) for w in workers]
  finally:
    for worker in workers:
      if worker.process.poll() is None:
        worker.process.kill()


def wait_for_step(workdir: Path, step: int, workers: Sequence[Worker]) -> None:
  """Returns when the run has written the metrics of `step`."""
  file = workdir / 'metrics.jsonl'
  while all(w.process.poll() is None for w in workers):
    if file.exists() and len(file.read_text().splitlines()) >= step:
      return
    time.sleep(0.01)
  raise AssertionError('\n'.join(w.said() for w in workers))


def result(worker: Worker) -> dict:
  """What a worker that ended well printed last."""
  return json.loads(worker.said().splitlines()[-1])
