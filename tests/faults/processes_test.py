"""Several processes that are one run: same numbers, and what befalls them."""

import json
import shutil
import signal
import time
from itertools import chain

import numpy as np
import pytest
from absl.testing import absltest

from deepseek_jax import errors
from tests import fake_devices
from tests.faults import launches, ledger, runs

_STEPS = 24


def _metrics(folder) -> list[dict]:
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.slow
class ProcessesTest(runs.RunTest):
  """In one order, as each start costs seconds: what later tests need first."""

  def run_to_end(self, name: str, *flags: str, **shape) -> dict:
    """'state', and 'batches': per step the rows of all processes in order."""
    workers = launches.start(
      self.folder / name, f'--steps={_STEPS}', *flags, **shape
    )
    codes = launches.end(workers)
    said = '\n'.join(w.said() for w in workers)
    self.assertEqual(codes, [0] * len(workers), msg=said)
    found_by, count = shape.get('found_by', 'arguments'), shape.get('count', 1)
    for index in range(count if count > 1 else 0):
      who = f'process {index} of {count} (found by {found_by}): 2 of 4 cpu'
      self.assertIn(who, workers[index].said())
    results = [launches.result(w) for w in workers]
    steps = zip(*(r['batches'] for r in results))
    return results[0] | {'batches': [list(chain(*rows)) for rows in steps]}

  def assert_close(self, name: str):
    """Metrics to rounding, counts of choices exactly."""
    want, got = _metrics(self.folder / 'straight'), _metrics(self.folder / name)
    self.assertEqual([r['step'] for r in got], [r['step'] for r in want])
    for a, b in zip(want, got):
      self.assertEqual(a['max_violation'], b['max_violation'])
      for key, value in a.items():
        np.testing.assert_allclose(b[key], value, rtol=1e-5, err_msg=key)

  def test_processes(self):
    self.straight = self.run_to_end('straight', count=2, devices=2)
    self.one_process_equals_two()
    self.one_of_two_is_terminated()
    self.one_of_two_is_killed()
    self.another_number_of_processes_goes_on()

  def one_process_equals_two(self):
    with ledger.fault('1 process x 4 devices for 2 x 2'):
      four = self.run_to_end('four', '--all_devices', devices=4)
      self.assert_close('four')
      self.assertEqual(four['batches'], self.straight['batches'])
      self.assertGreater(len(set(chain(*four['batches']))), _STEPS)

  def one_of_two_is_terminated(self):
    folder = self.folder / 'terminated'
    with ledger.fault('SIGTERM to one of two processes'):
      workers = launches.start(
        folder, f'--steps={_STEPS}', '--pause=0.1', count=2, devices=2
      )
      launches.wait_for_step(folder, 4, workers)
      workers[1].process.send_signal(signal.SIGTERM)
      self.assertEqual(launches.end(workers), [77, 77])
      said = [
        next(l for l in w.said().splitlines() if l.startswith('preempted'))
        for w in workers
      ]
      print(f'SIGTERM to one of two processes: {said}')
      self.assertEqual(*said)
      self.keep_preempted()
      again = self.run_to_end(
        'terminated', count=2, devices=2, found_by='slurm'
      )
      self.assertEqual(again['state'], self.straight['state'])
      self.assertEqual(
        (folder / 'metrics.jsonl').read_bytes(),
        (self.folder / 'straight' / 'metrics.jsonl').read_bytes(),
      )

  def keep_preempted(self):
    for name in ('one', 'lone'):
      shutil.copytree(self.folder / 'terminated', self.folder / name)

  def one_of_two_is_killed(self):
    folder = self.folder / 'killed'
    with ledger.fault('SIGKILL of a peer'):
      workers = launches.start(
        folder, f'--steps={_STEPS}', '--pause=0.1', count=2, devices=2
      )
      launches.wait_for_step(folder, 8, workers)
      workers[1].process.kill()
      start = time.monotonic()
      survivor, killed = launches.end(workers)
      seconds = time.monotonic() - start
      print(
        f'SIGKILL of a peer: the survivor ends {survivor} in {seconds:.1f} s'
      )
      self.assertEqual(killed, -signal.SIGKILL)
      # A shell sees 128 + N where Python sees -N.
      survivor = 128 - survivor if survivor < 0 else survivor
      self.assertIn(survivor, errors.START_AGAIN, msg=workers[0].said())
      self.assertLess(seconds, launches.HEARTBEAT + 5)
      again = self.run_to_end(
        'killed', count=2, devices=2, found_by='environment'
      )
      self.assertEqual(again['state'], self.straight['state'])

  def another_number_of_processes_goes_on(self):
    with ledger.fault('resumed by another number of processes', 2):
      self.run_to_end('one', '--all_devices', devices=4)
      self.assert_close('one')
      self.run_to_end('lone')
      self.assert_close('lone')


@pytest.mark.slow
class MeshTest(runs.RunTest):
  def test_a_checkpoint_of_4x2_is_read_on_any_mesh(self):
    with ledger.fault('another mesh', 4):
      found = fake_devices.run(
        'tests.faults.mesh_worker', str(runs.home()), str(self.folder / 'c')
      )
      print(f'saved on 4x2, same bits of all arrays, most spread: {found}')
      for mesh, (same, arrays, _) in found.items():
        self.assertEqual(same, arrays, msg=mesh)
      spread = {mesh: parts for mesh, (_, _, parts) in found.items()}
      self.assertEqual(spread, {'4x2': 8, '1x1': 1, '2x2': 4, '8x1': 8})


if __name__ == '__main__':
  absltest.main()
