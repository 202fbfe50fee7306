"""Leftovers of a killed build go; what may be in use stays."""

import os
import tempfile
import time
from pathlib import Path

from absl.testing import absltest

from deepseek_jax.data import leftovers

_KEY = '0123456789abcdef0123'


class LeftoversTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def make(self, name: str, *, days: float, file_days: float | None = None):
    folder = self.folder / name
    folder.mkdir()
    (folder / 'train.bin').write_bytes(b'1')
    now, day = time.time(), 24 * 3600
    for path, age in (
      (folder / 'train.bin', days if file_days is None else file_days),
      (folder, days),
    ):
      os.utime(path, (now - age * day, now - age * day))

  def test_only_old_unfinished_stores_go(self):
    self.make(f'{_KEY}.0a1b2c3d.tmp', days=2)
    self.make(f'{_KEY}.0a1b2c3e.tmp', days=0.5)
    self.make(f'{_KEY}.0a1b2c3f.tmp', days=2, file_days=0.1)  # it lives
    self.make(_KEY, days=9)
    self.make('mine.tmp', days=9)
    self.make(f'{_KEY}.0a1b2c3d.tmp.mine', days=9)
    (self.folder / 'thesis').mkdir()
    os.symlink(self.folder / 'thesis', self.folder / f'{_KEY}.00000000.tmp')
    before = set(os.listdir(self.folder))
    self.assertEqual(
      leftovers.remove(str(self.folder)), [f'{_KEY}.0a1b2c3d.tmp']
    )
    self.assertEqual(
      before - set(os.listdir(self.folder)), {f'{_KEY}.0a1b2c3d.tmp'}
    )
    self.assertEqual(leftovers.remove(str(self.folder / 'nothing')), [])


if __name__ == '__main__':
  absltest.main()
