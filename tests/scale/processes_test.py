"""Several processes, joined by gloo, train as one process does."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from rich.console import Console
from rich.table import Table

from tests import fake_devices
from tests.faults import launches, runs
from tests.scale import worker

_seen = {}


def start(folder: Path, command, count: int, environment):
  """Workers of one run; what they print is in the folder."""
  workers = []
  for index in range(count):
    output = folder / f'{index}.log'
    own = [f'--process={index}'] if count > 1 else []
    with output.open('w') as log:
      process = subprocess.Popen(
        command + own,
        cwd=fake_devices.ROOT,
        env=environment,
        stdout=log,
        stderr=log,
      )
    workers.append(launches.Worker(process, output))
  return workers


@functools.cache
def losses(processes: int, devices: int, spread: bool = True):
  """Of a run of `processes`, each with `devices`."""
  environment = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(devices),
  }
  command = [sys.executable, '-m', 'tests.scale.worker']
  with tempfile.TemporaryDirectory() as scratch:
    command += [f'--home={runs.home()}', f'--workdir={scratch}/run']
    command += [f'--spread={spread}']
    if processes > 1:
      port = launches.free_port()
      command += [f'--processes={processes}', f'--coordinator=127.0.0.1:{port}']
    workers = start(Path(scratch), command, processes, environment)
    codes = launches.end(workers, 700)
    if any(codes):
      said = '\n'.join(w.said()[-2000:] for w in workers)
      raise AssertionError(f'exit codes {codes}: {said}')
    return np.array(launches.result(workers[0]))


def tearDownModule():
  table = Table(title='several processes against one')
  for column in ('processes', 'devices of each', 'difference of loss'):
    table.add_column(column, justify='right')
  for (processes, devices), gap in _seen.items():
    table.add_row(str(processes), str(devices), f'{gap:.1e}')
  Console(width=100).print(table)


@pytest.mark.slow
class ProcessesTest(parameterized.TestCase):
  @parameterized.parameters((1, 4), (2, 2), (4, 1))
  def test_losses_are_those_of_one_process_with_one_device(self, count, each):
    want = losses(1, 1, False)
    got = losses(count, each)
    self.assertLen(got, worker.STEPS)
    _seen[count, each] = np.abs(got / want - 1).max()
    self.assertLess(_seen[count, each], 1e-5)


if __name__ == '__main__':
  absltest.main()
