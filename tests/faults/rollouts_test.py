"""A run over rollouts, killed in rounds, between updates and in saves."""

import json
import random
import shutil
import time

import numpy as np
import pytest
from absl.testing import absltest

from tests.faults import damage_test, launches, ledger, rollouts_task, runs

_ROUNDS = 20
_STEPS = 24  # of the worker's run
_MODULE = 'tests.faults.rollouts_worker'


@pytest.mark.slow
class KilledRolloutsTest(runs.RunTest):
  def start(self, name: str, *flags: str):
    return launches.start(self.folder / name, *flags, module=_MODULE)

  def finish(self, name: str) -> str:
    workers = self.start(name)
    self.assertEqual(launches.end(workers), [0], msg=workers[0].said())
    return launches.result(workers[0])['state']

  def metrics(self, name: str) -> bytes:
    return (self.folder / name / 'metrics.jsonl').read_bytes()

  def steps(self, name: str) -> list[int]:
    saves = self.folder / name / 'checkpoints'
    names = [p.name for p in saves.iterdir()] if saves.is_dir() else []
    return sorted(int(n) for n in names if n.isdigit())

  def test_killed_at_random_moments_it_ends_as_ever(self):
    folder = rollouts_task.folder_of(runs.home())
    rollouts_task.write_task(folder)
    want, rng = self.finish('straight'), random.Random(0)
    metrics, within = self.metrics('straight'), 0
    with ledger.fault('SIGKILL in a round of rollouts', _ROUNDS):
      for kill in range(_ROUNDS):
        (worker,) = self.start('killed', '--pause=0.1')
        done = max(self.steps('killed'), default=0)
        until = min(done + 1, _STEPS - 2)
        while not any(step >= until for step in self.steps('killed')):
          self.assertIsNone(worker.process.poll(), msg=worker.said())
          time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        worker.process.kill()
        worker.process.wait()
        saved = self.steps('killed')
        within += saved[-1] % 2
        print(f'SIGKILL {kill + 1} of {_ROUNDS}: saved are {saved}', flush=True)
      print(f'{within} of {_ROUNDS} kills left half a round')
      self.assertGreater(within, 0)
      self.assertEqual(self.finish('killed'), want)
      self.assertEqual(self.metrics('killed'), metrics)
    with ledger.fault('a saved round of rollouts damaged'):
      saves = self.folder / 'killed' / 'checkpoints'
      for step in self.steps('killed')[:-1]:
        shutil.rmtree(saves / str(step))
      last = saves / str(_STEPS) / 'held'
      files = [p for p in last.rglob('*') if p.is_file()]
      damage_test.flip(max(files, key=lambda path: path.stat().st_size))
      workers = self.start('killed')
      self.assertEqual(launches.end(workers), [2], msg=workers[0].said())
      told = workers[0].said().splitlines()[-1]
      self.assertRegex(told, '^error: .*no checkpoint is whole')
      self.assertEqual(self.steps('killed'), [_STEPS])

  def test_two_processes_are_one_run(self):
    rollouts_task.write_task(rollouts_task.folder_of(runs.home()))
    self.finish('straight')
    workers = launches.start(self.folder / 'two', count=2, module=_MODULE)
    codes = launches.end(workers, 400)
    self.assertEqual(codes, [0, 0], msg='\n'.join(w.said() for w in workers))
    rows = lambda name: [
      json.loads(line) for line in self.metrics(name).splitlines()
    ]
    for a, b in zip(rows('straight'), rows('two'), strict=True):
      for key in ('reward', 'answer_length', 'verifier_errors', 'redrawn'):
        self.assertEqual(a.get(key), b.get(key))
      for key in ('loss', 'kl', 'grad_norm', 'mismatch_most'):
        if key in a:
          np.testing.assert_allclose(a[key], b[key], rtol=1e-4, atol=1e-6)


if __name__ == '__main__':
  absltest.main()
