"""Runs as processes: killed in saves, terminated, without disk, hanging."""

import random
import resource
import time

import pytest
from absl.testing import absltest

from deepseek_jax import data as datalib
from deepseek_jax.run import integrity
from tests.faults import launches, ledger, runs

_ROUNDS = 20
_FLAGS = ('--steps=24', '--every=1')


@pytest.mark.slow
class KilledTest(runs.RunTest):
  """Each from its first step to its last, through whatever happens."""

  def finish(self, name: str):
    workers = launches.start(self.folder / name, *_FLAGS)
    codes = launches.end(workers)
    self.assertEqual(codes, [0], msg=workers[0].said())
    return launches.result(workers[0])['state'], workers[0].said()

  def start(self, name: str, *flags: str):
    return launches.start(self.folder / name, *_FLAGS, *flags)

  def metrics(self, name: str) -> bytes:
    return (self.folder / name / 'metrics.jsonl').read_bytes()

  def assert_as_straight(self, name: str, state: str):
    self.assertEqual(state, self.straight)
    self.assertEqual(self.metrics(name), self.metrics('straight'))

  def test_processes(self):
    self.straight, _ = self.finish('straight')
    self.killed_at_random()
    self.terminated()
    self.out_of_disk()
    self.hanging()

  def killed_at_random(self):
    """SIGKILL: a save is under way at nearly every moment of these runs."""
    rng, saves = random.Random(0), self.folder / 'killed' / 'checkpoints'
    with ledger.fault('SIGKILL at a random moment of a save', _ROUNDS):
      done, unfinished = 0, 0
      for kill in range(_ROUNDS):
        (worker,) = self.start('killed', '--pause=0.03')
        launches.wait_for_step(self.folder / 'killed', done + 1, [worker])
        time.sleep(rng.uniform(0, 0.15))
        worker.process.kill()
        worker.process.wait()
        done = min(len(self.metrics('killed').splitlines()), 22)
        left = [p.name for p in saves.glob('*tmp*')]
        unfinished += bool(left)
        whole = [
          p.name
          for p in saves.iterdir()
          if p.name.isdigit() and integrity.problem(p) is None
        ]
        print(
          f'SIGKILL {kill + 1} of {_ROUNDS}: after step {done}, whole are'
          f' {sorted(map(int, whole))}, unfinished {left}',
          flush=True,
        )
      print(f'{unfinished} of {_ROUNDS} kills left an unfinished save')
      self.assertGreater(unfinished, 0)
      state, _ = self.finish('killed')
      self.assert_as_straight('killed', state)

  def terminated(self):
    with ledger.fault('SIGTERM to a lone process'):
      workers = self.start('terminated', '--pause=0.1')
      launches.wait_for_step(self.folder / 'terminated', 4, workers)
      workers[0].process.terminate()
      self.assertEqual(launches.end(workers), [77], msg=workers[0].said())
      print(f'SIGTERM: {workers[0].said().splitlines()[-1]}')
      self.assertIn('preempted: step', workers[0].said())
      state, said = self.finish('terminated')
      self.assertIn('resumed from step', said)
      self.assert_as_straight('terminated', state)

  def out_of_disk(self):
    """The files of a save meet a limit; what was saved before stays."""
    with ledger.fault('disk full under a process'):
      workers = self.start('full', '--pause=0.1')
      launches.wait_for_step(self.folder / 'full', 6, workers)
      small = (24 << 10, resource.RLIM_INFINITY)  # less than the arrays
      resource.prlimit(workers[0].process.pid, resource.RLIMIT_FSIZE, small)
      self.assertEqual(launches.end(workers), [2], msg=workers[0].said())
      last = workers[0].said().splitlines()[-1]
      print(f'disk full: {last}')
      self.assertRegex(last, '^error: .*(cannot be saved|make room)')
      self.assertNotIn('Traceback', workers[0].said())
      self.assertLess(len(workers[0].said().splitlines()), 30)
      state, _ = self.finish('full')
      self.assert_as_straight('full', state)

  def hanging(self):
    with ledger.fault('a step that hangs'):
      workers = self.start('hanging', '--hang=9')
      self.assertEqual(launches.end(workers), [79], msg=workers[0].said())
      self.assertIn('a step takes more than', workers[0].said())
      self.assertIn('stuck_in_a_collective', workers[0].said())
      print('a hanging step: status 79, all stacks')
      state, _ = self.finish('hanging')
      self.assert_as_straight('hanging', state)


@pytest.mark.slow
class DataTest(runs.RunTest):
  """A damaged data shard ends a launch before its first step."""

  def test_damaged_data(self):
    runs.straight()
    store = datalib.build(runs.config(runs.home()).data)
    for name in ('train.bin', 'tokenizer.json', 'index.json'):
      with ledger.fault(f'{name} damaged'):
        file = runs.Path(store.path) / name
        content = file.read_bytes()
        self.addCleanup(file.write_bytes, content)
        file.write_bytes(content[:-9] + b'x' + content[-8:])
        workers = launches.start(self.folder / 'run', '--steps=2')
        self.assertEqual(launches.end(workers), [2], msg=workers[0].said())
        last = workers[0].said().splitlines()[-1]
        print(f'{name} damaged: {last}')
        self.assertIn(f'{name} is damaged', last)
        file.write_bytes(content)


if __name__ == '__main__':
  absltest.main()
