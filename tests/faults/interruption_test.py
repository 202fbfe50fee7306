"""Runs that end early: asked to, or in the middle of things."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest

from deepseek_jax import data as datalib
from deepseek_jax import say
from deepseek_jax.errors import InputError, Preempted, Terminated
from deepseek_jax.record import last_steps, timeline
from deepseek_jax.run import replay
from tests.faults import damage_test, ledger, runs


def _terminate():
  os.kill(os.getpid(), signal.SIGTERM)


# As a compiler does: its main thread stays in C and lets other threads run. It
# says so by a second thread, as a signal before that is heard in Python.
_DEAF = """
import hashlib, threading
from deepseek_jax.run.preemption import Preemption
with Preemption():
  threading.Timer(1.0, print, ['compiling'], {'flush': True}).start()
  hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)
"""


class PreemptionTest(runs.RunTest):
  def test_preempted_twice_and_damaged_it_goes_on_bit_for_bit(self):
    before = signal.getsignal(signal.SIGTERM)
    with ledger.fault('SIGTERM'):
      with (
        self.before_step(5, _terminate),
        self.assertRaisesRegex(Preempted, 'step 5 is saved') as caught,
      ):
        self.fit('resumed')
      self.assertEqual(caught.exception.status, 77)
      self.assertEqual(signal.getsignal(signal.SIGTERM), before)
      folder = self.folder / 'resumed'
      self.assertTrue((folder / 'checkpoints' / '5').is_dir())
    with self.before_step(7, _terminate), self.assertRaises(Preempted):
      self.fit('resumed')
    spent = timeline.totals(folder / 'timeline.jsonl')
    self.assertNotIn('lost', spent)
    damage_test.flip(
      max(
        (folder / 'checkpoints' / '7' / 'state').rglob('d/*'),
        key=lambda path: path.stat().st_size,
      )
    )
    with ledger.fault('SIGTERM, then a flipped bit'):
      # The last step is no time to stop; what is safe may change at will.
      with (
        mock.patch.object(say, 'warn') as warned,
        self.before_step(8, _terminate),
      ):
        resumed = self.fit('resumed', **{'safety.last_steps': 4})
      self.assertIn('checkpoint 7 is rejected', warned.call_args[0][0])
      self.assert_same_as_straight('resumed', resumed)
    spent = timeline.totals(folder / 'timeline.jsonl')
    self.assertGreater(spent['lost'], 0)

  def test_ctrl_c_saves_the_step_and_a_second_one_ends_at_once(self):
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
    before = signal.default_int_handler  # started in the background: deaf
    self.addCleanup(
      signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, before)
    )
    # Before the first step is done there is nothing to save.
    with self.before_step(1, interrupt), self.assertRaises(KeyboardInterrupt):
      self.fit('interrupted')
    with (
      self.before_step(5, interrupt),
      self.assertRaisesRegex(Preempted, 'step 5 is saved'),
    ):
      self.fit('interrupted')
    self.assertIs(signal.getsignal(signal.SIGINT), before)
    twice = lambda: (interrupt(), interrupt())
    with self.before_step(7, twice), self.assertRaises(KeyboardInterrupt):
      self.fit('interrupted')
    self.assertIs(signal.getsignal(signal.SIGINT), before)
    self.assert_same_as_straight('interrupted', self.fit('interrupted'))

  def test_before_the_first_step_of_a_launch_there_is_nothing_to_save(self):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    with ledger.fault('SIGTERM before the first step', 2):
      with (
        mock.patch.object(datalib, 'build', lambda config, say: _terminate()),
        self.assertRaisesRegex(Terminated, 'SIGTERM before the first step'),
      ):
        self.fit('early')
      with (
        self.before_step(1, _terminate),
        self.assertRaises(Terminated) as caught,
      ):
        self.fit('early')
      self.assertEqual(caught.exception.status, 143)
      self.assertEmpty(list((self.folder / 'early' / 'checkpoints').iterdir()))
      with self.before_step(4, _terminate), self.assertRaises(Preempted):
        self.fit('early')
      # This one resumes: its first step is 5.
      with self.before_step(5, _terminate), self.assertRaises(Terminated):
        self.fit('early')
      self.assert_same_as_straight('early', self.fit('early'))
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)]
    self.assertEqual(after, before)

  def test_a_closed_terminal_saves_the_step(self):
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
      self.addCleanup(signal.signal, signal.SIGHUP, signal.SIG_IGN)
      signal.signal(signal.SIGHUP, signal.SIG_DFL)
    hang_up = lambda: os.kill(os.getpid(), signal.SIGHUP)
    with ledger.fault('SIGHUP'):
      with (
        self.before_step(5, hang_up),
        self.assertRaisesRegex(Preempted, 'step 5 is saved'),
      ):
        self.fit('closed')
      self.assert_same_as_straight('closed', self.fit('closed'))

  def test_a_main_thread_that_hears_no_signal_ends_all_the_same(self):
    with subprocess.Popen(
      [sys.executable, '-c', _DEAF],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=damage_test.ROOT,
    ) as process:
      self.addCleanup(process.kill)
      self.assertEqual(process.stdout.readline(), 'compiling\n')
      process.terminate()
      _, said = process.communicate(timeout=60)
    self.assertEqual(process.returncode, 143, msg=said)
    self.assertRegex(said, '^SIGTERM before the first step: nothing new is')

  def test_safety_that_makes_no_sense_is_refused(self):
    with self.assertRaisesRegex(InputError, r'safety.hang_factor = -1'):
      runs.config(runs.home(), **{'safety.hang_factor': -1.0})


class OrderTest(runs.RunTest):
  def _batches(self, name, *, killed_at=None):
    """Fingerprints of all batches that the run called `name` reads."""
    seen, original = [], datalib.Batches.next

    def noted(batches, *args):
      at = batches.get_state()['next_index'] // runs.ROWS + 1
      if at == killed_at:
        raise KeyboardInterrupt
      batch = original(batches, *args)
      seen.append((at, last_steps.digest(batch)))
      return batch

    with mock.patch.object(datalib.Batches, 'next', noted):
      if killed_at is None:
        self.fit(name)
      else:
        with self.assertRaises(KeyboardInterrupt):
          self.fit(name)
    return seen

  def test_batches_after_a_resumption_are_those_of_the_straight_run(self):
    with ledger.fault('killed between checkpoints'):
      straight = self._batches('straight')
      self.assertLen({sha for _, sha in straight}, 8)
      begun = self._batches('resumed', killed_at=6)
      rest = self._batches('resumed')
      self.assertEqual(begun[:3] + rest, straight)
      self.assertEqual(rest[0][0], 4)
      for name in ('straight', 'resumed'):  # two runs of one seed, too
        self.assert_same_metrics_as_straight(name)

  @pytest.mark.slow
  def test_another_seed_writes_other_metrics(self):
    self.fit('run', seed=1)
    with self.assertRaises(AssertionError):
      self.assert_same_metrics_as_straight('run')


class ReplayTest(runs.RunTest):
  def test_steps_repeat_to_the_last_bit_from_the_checkpoint_before(self):
    runs.straight()
    workdir = runs.home() / 'straight'
    before = sorted(workdir.rglob('*'))
    rows = list(replay.replay(workdir, 5))
    self.assertEqual([row.step for row in rows], [4, 5])
    self.assertTrue(all(row.same and row.written for row in rows))
    self.assertEqual(rows[1].batch['index'], 4 * runs.ROWS)
    self.assertEqual(sorted(workdir.rglob('*')), before)
    self.assertEqual([r.step for r in replay.replay(workdir, 2)], [1, 2])

  def test_a_number_that_does_not_come_back_is_seen(self):
    row = replay.Replayed(1, 2.0, np.nan, {'loss': 2.0, 'grad_norm': 3.0}, {})
    self.assertFalse(row.same)
    row = replay.Replayed(1, 2.0, np.nan, {'grad_norm': np.nan}, {})
    self.assertTrue(row.same)

  def test_a_folder_without_a_run_is_refused(self):
    with self.assertRaisesRegex(InputError, 'holds no run'):
      next(replay.replay(self.folder, 1))
    runs.straight()
    with self.assertRaisesRegex(InputError, 'step = 9: the run has 8 steps'):
      next(replay.replay(runs.home() / 'straight', 9))


_HANG = """
import sys, time
from deepseek_jax.run.watchdog import Watchdog
watchdog = Watchdog(5, 0.5, lambda seconds: print('hung', flush=True))
for _ in range(4):
  with watchdog.step():
    time.sleep(0.01)
time.sleep(1)  # outside of a step nothing is watched
print('limit', watchdog.limit, flush=True)
def stuck_in_a_collective():
  time.sleep(60)
with watchdog.step():
  stuck_in_a_collective()
"""


class WatchdogTest(absltest.TestCase):
  def test_a_hanging_step_dumps_all_stacks_and_exits_79(self):
    fault = ledger.fault('a hanging step')
    self.enter_context(fault)
    done = subprocess.run(
      [sys.executable, '-c', _HANG],
      capture_output=True,
      text=True,
      cwd=damage_test.ROOT,
      timeout=50,
      check=False,
    )
    self.assertEqual(done.returncode, 79, msg=done.stderr)
    self.assertEqual(done.stdout, 'limit 0.5\nhung\n')
    self.assertIn('a step takes more than 0.5 s', done.stderr)
    self.assertIn('stuck_in_a_collective', done.stderr)


class TimelineTest(absltest.TestCase):
  def test_what_a_later_launch_repeats_is_lost_once(self):
    folder = self.enter_context(tempfile.TemporaryDirectory())
    path = Path(folder) / 'timeline.jsonl'
    first = timeline.Timeline(path)
    first.add('compile', 4.0)
    first.begin(0)
    first.add('step', 3.0)
    first.reached(3)
    first.write()
    first.add('step', 2.0)
    first.add('data', 0.5)
    first.reached(5)
    first.write()
    with path.open('a') as file:
      file.write('{"phase": "step", "sec')  # killed while it wrote
    second = timeline.Timeline(path)
    second.begin(3)
    second.add('step', 2.25)
    second.write()
    want = {'compile': 4.0, 'step': 5.25, 'lost': 2.5}
    self.assertEqual(timeline.totals(path), want)
    timeline.Timeline(path).begin(3)
    self.assertEqual(timeline.totals(path), want)
    self.assertEqual(
      second.summary(), 'time: step 44.7 %, compile 34.0 %, lost 21.3 %'
    )


if __name__ == '__main__':
  absltest.main()
