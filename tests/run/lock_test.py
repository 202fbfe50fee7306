"""Of two runs in one folder the second is refused; a dead one frees it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from absl.testing import absltest

from deepseek_jax.errors import InputError
from deepseek_jax.run import lock

_ROOT = Path(__file__).parents[2]
_HOLDER = """
import sys, time
from pathlib import Path
from deepseek_jax.run import lock
lock.take(Path(sys.argv[1]))
print('taken', flush=True)
time.sleep(600)
"""
_SECOND = """
import sys
from pathlib import Path
from deepseek_jax.run import lock
from deepseek_jax.cli import common
common.launch(lambda argv: lock.take(Path(argv[1])), arguments=True)
"""


def _start(code: str, folder: Path) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, '-c', code, str(folder)],
    cwd=_ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


class LockTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def test_two_processes(self):
    with _start(_HOLDER, self.folder) as holder:
      self.addCleanup(holder.kill)
      self.assertEqual(holder.stdout.readline(), 'taken\n')
      second = _start(_SECOND, self.folder)
      _, err = second.communicate(timeout=200)
      self.assertEqual(second.returncode, 2, msg=err)
      self.assertLen(err.splitlines(), 1, msg=err)
      words = f'workdir {self.folder}: a run is under way there (process'
      self.assertIn(f'{words} {holder.pid} on ', err)
      with self.assertRaisesRegex(InputError, 'choose another --workdir'):
        lock.take(self.folder)
      holder.kill()
    lock.take(self.folder)

  def test_a_process_may_take_it_again(self):
    lock.take(self.folder)
    lock.take(self.folder)
    second = _start(_SECOND, self.folder)
    _, err = second.communicate(timeout=200)
    self.assertEqual(second.returncode, 2, msg=err)

  def test_a_file_system_without_locks_warns(self):
    lines = []
    refuses = mock.patch.object(
      lock, '_lock', side_effect=OSError(95, 'Operation not supported')
    )
    with refuses, mock.patch.object(lock.say, 'warn', lines.append):
      lock.take(self.folder)
    self.assertLen(lines, 1)
    self.assertIn('cannot be locked (Operation not supported)', lines[0])


if __name__ == '__main__':
  absltest.main()
