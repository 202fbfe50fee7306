"""A disk that takes no more: one line, and nothing lost that was saved."""

import contextlib
import gc
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

from deepseek_jax import say
from deepseek_jax.errors import InputError
from deepseek_jax.run import checkpoint
from deepseek_jax.run.checkpoint import Checkpoints
from tests.faults import ledger, runs


def _limit(size: int) -> None:
  _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


@contextlib.contextmanager
def small_files():
  """No file may exceed 4 KiB: a full disk for who is not root."""
  _limit(4096)
  try:
    yield
  finally:
    _limit(resource.RLIM_INFINITY)


def _state(step: int, size: int = 64) -> dict:
  draw = np.random.default_rng(step).normal
  return {'w': jnp.asarray(draw(size=(size, size)), jnp.float32)}


# Orbax leaves coroutines behind when a write fails.
_LEFT = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


@_LEFT
class FullDiskTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory())) / 'c'
    self.said = []
    self.addCleanup(gc.collect)  # what is left is of this test
    self.enter_context(mock.patch.object(checkpoint, '_PAUSE', 0.0))
    # Orbax logs pages about what it raises, too.
    self.enter_context(mock.patch('absl.logging.error'))

  def open(self) -> Checkpoints:
    opened = Checkpoints(self.folder, keep=9, say=self.said.append)
    return self.enter_context(opened)

  def assert_whole(self, checkpoints, *steps):
    self.assertEqual(checkpoints.steps(), list(steps))
    for step in steps:
      self.assertEqual(checkpoints.newest_whole(before=step + 1), step)
      like = jax.eval_shape(lambda: _state(0))
      restored = checkpoints.restore(step, like).state
      np.testing.assert_array_equal(restored['w'], _state(step)['w'])
    self.assertEmpty(list(self.folder.glob('*tmp*')))

  def test_the_next_save_makes_up_for_one_that_failed(self):
    checkpoints = self.open()
    checkpoints.save(1, _state(1), {}, {}, wait=True)
    with ledger.fault('disk full for one save'):
      with small_files():
        checkpoints.save(2, _state(2), {}, {})
        checkpoints.wait()
      checkpoints.save(3, _state(3), {}, {}, wait=True)
      self.assertEqual(
        self.said, ['checkpoint 2 was not saved: File too large']
      )
      self.assert_whole(checkpoints, 1, 3)

  def test_a_save_that_is_waited_for_is_tried_again(self):
    checkpoints = self.open()
    with (
      ledger.fault('disk full for a moment'),
      mock.patch.object(checkpoint.time, 'sleep') as pause,
    ):
      pause.side_effect = lambda seconds: _limit(resource.RLIM_INFINITY)
      with small_files():
        checkpoints.save(1, _state(1), {}, {}, wait=True)
      pause.assert_called_once()
      self.assert_whole(checkpoints, 1)

  def test_two_in_a_row_are_a_refusal_that_loses_nothing(self):
    checkpoints = self.open()
    checkpoints.save(1, _state(1), {}, {}, wait=True)
    with ledger.fault('disk full'):
      with small_files():
        checkpoints.save(2, _state(2), {}, {})
        message = (
          r'checkpoint 3 cannot be saved \(File too large\); checkpoints'
        )
        with self.assertRaisesRegex(InputError, message) as caught:
          checkpoints.save(3, _state(3), {}, {}, wait=True)
      self.assertNotIn('\n', str(caught.exception))
      self.assertIn(str(self.folder), str(caught.exception))
      self.assert_whole(checkpoints, 1)

  def test_what_is_no_storage_failure_keeps_its_traceback(self):
    checkpoints = self.open()
    defect = mock.patch.object(
      checkpoints._manager,
      'wait_until_finished',
      side_effect=ValueError('ours'),
    )
    with defect, self.assertRaisesRegex(ValueError, 'ours') as caught:
      checkpoints.save(1, _state(1), {}, {}, wait=True)
    self.assertNotIsInstance(caught.exception, InputError)

  @pytest.mark.slow
  def test_a_small_disk(self):
    """As root alone: a file system of 1 MiB, in memory."""
    self.folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', self.folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
      self.skipTest('may not mount')
    self.addCleanup(subprocess.run, ['umount', '-l', self.folder], check=True)
    checkpoints, failed = self.open(), None
    with ledger.fault('file system full'):
      for step in range(1, 9):
        try:
          checkpoints.save(step, _state(step, 256), {}, {}, wait=True)
        except InputError as error:
          failed = step, str(error)
          break
      print(f'file system full: {failed}')
      self.assertIsNotNone(failed)
      self.assertGreater(failed[0], 1)
      self.assertIn('No space left on device', failed[1])
      self.assertEqual(checkpoints.newest_whole(), failed[0] - 1)


@_LEFT
@pytest.mark.slow
class FullDiskRunTest(runs.RunTest):
  def fill_disk(self):
    while not (self.folder / 'run' / 'checkpoints' / '3').exists():
      time.sleep(0.01)
    _limit(4096)

  def test_a_run_without_disk_ends_and_goes_on_bit_for_bit(self):
    self.enter_context(mock.patch.object(checkpoint, '_PAUSE', 0.0))
    self.enter_context(mock.patch('absl.logging.error'))
    self.addCleanup(gc.collect)
    with ledger.fault('disk full in a run'):
      with (
        mock.patch.object(say, 'warn') as warned,
        self.assertRaisesRegex(InputError, r'checkpoint 8 cannot be saved'),
        self.before_step(5, self.fill_disk),
      ):
        try:
          self.fit('run')
        finally:
          _limit(resource.RLIM_INFINITY)
      said = [call.args[0] for call in warned.call_args_list]
      self.assertEqual(said[0], 'checkpoint 6 was not saved: File too large')
      again = self.fit('run')
      self.assert_same_as_straight('run', again)


if __name__ == '__main__':
  absltest.main()
