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


def start(
  workdir: Path, *flags: str, count: int = 1, devices: int = 1
) -> list[Worker]:
  """`count` processes of one run, each with `devices` devices."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
    'JAX_COMPILATION_CACHE_DIR': str(runs.home() / 'programs'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  command = [sys.executable, '-m', 'tests.faults.worker', *flags]
  command += [f'--home={runs.home()}', f'--workdir={workdir}']
  if count > 1:
    command += [
      f'--coordinator=127.0.0.1:{free_port()}',
      f'--processes={count}',
    ]
    command += [f'--heartbeat={HEARTBEAT}']
  workers = []
  for index in range(count):
    output = workdir.with_name(f'{workdir.name}.{index}.log')
    own = [f'--process={index}'] if count > 1 else []
    with output.open('w') as log:
      process = subprocess.Popen(
        command + own, cwd=ROOT, env=environment, stdout=log, stderr=log
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
