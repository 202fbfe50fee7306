"""Checks that replay of first steps begins where the run itself began."""

import tempfile
from pathlib import Path

from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.transformer_config import Kind
from deepseek_jax.run import replay, steps
from tests.faults import runs
from tests.rl.sft_run_test import TINY

MEMORY = ds.changed(
  TINY,
  {
    'layout': ((('memory',), 1),),
    'kinds': {**TINY.kinds, 'memory': Kind('ffn', engram=True)},
    'engram': EngramConfig(base=512, heads=2, dim=8),
  },
)


class ReplayTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.enter_context(steps.shared_programs())

  def fit(self, name, model=TINY, **changes):
    made = runs.config(runs.home(), 2, **changes)
    made = ds.changed(made, {'model': model, 'checkpoint_every': 0})
    ds.fit(made, self.folder / name, console=False)

  def assert_comes_back(self, name):
    rows = list(replay.replay(self.folder / name, 2))
    self.assertEqual([row.step for row in rows], [1, 2])
    for row in rows:
      self.assertTrue(row.same and row.written, row)

  def test_begins_with_the_weights_of_init_from(self):
    self.fit('first')
    self.fit('warm', init_from=str(self.folder / 'first'))
    self.assert_comes_back('warm')

  def test_reads_the_ngrams_that_the_run_has_read(self):
    self.fit('memory', MEMORY)
    self.assert_comes_back('memory')


if __name__ == '__main__':
  absltest.main()
