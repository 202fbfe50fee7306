"""A run folder of an earlier version (commit 1d1d723) is read as it was."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds

FOLDER = Path(__file__).with_name('run_of_1d1d723')


class OldRunTest(absltest.TestCase):
  def test_it_loads_and_says_what_it_was(self):
    with tempfile.TemporaryDirectory() as folder:
      copy = Path(folder) / 'run'  # reading leaves it as it is
      shutil.copytree(FOLDER, copy)
      loaded = ds.load(copy)
    self.assertEqual(loaded.step, 6)
    self.assertEqual(loaded.config.train.tokens, 768.0)
    self.assertEqual(loaded.config.objective, ds.PretrainingConfig())
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(loaded.variables):
      digest.update(np.asarray(leaf).tobytes())
    self.assertEqual(digest.hexdigest()[:16], 'a11f9f01c6d1fb6d')
    text = 'def f(x):\n'
    tokenizer = loaded.tokenizer
    self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

  def test_its_numbers_are_read(self):
    rows = [row for row in ds.read_metrics(FOLDER) if 'loss' in row]
    self.assertLen(rows, 6)
    load = ds.read_routing(FOLDER / 'routing.npz').arrays['load']
    self.assertEqual(int(load.sum(axis=-1).max()) % 2, 0)


if __name__ == '__main__':
  absltest.main()
