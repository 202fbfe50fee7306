"""Batches that are not finite, or far out, on their way through a whole run."""

import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from deepseek_jax import data as datalib
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import RunAborted
from deepseek_jax.record import last_steps, metrics
from deepseek_jax.run import fit as loop
from deepseek_jax.run import folder, replay
from tests.faults import ledger, runs

_BEL = '\a'  # thrice in every document
_POISON = ByteTokenizer().encode(_BEL)[0]
_STEPS = 24


class PoisonTest(runs.RunTest, parameterized.TestCase):
  """The byte's embedding is `value`: the batch decides what a step becomes."""

  def setUp(self):
    super().setUp()
    home = Path(self.enter_context(tempfile.TemporaryDirectory()))
    runs.write_corpus(home / 'corpus')
    for path in (home / 'corpus').iterdir():
      text = path.read_text()
      quarter = len(text) // 4
      parts = [text[n * quarter :][:quarter] for n in range(4)]
      path.write_text(_BEL.join(parts))
    self.home = home

  def poisoned(self, value: float):
    original = folder.fresh_state

    def fresh(config, model):
      state = original(config, model)
      embed = state.params['embed'].at[_POISON].add(value)
      return state._replace(params=state.params | {'embed': embed})

    self.enter_context(mock.patch.object(folder, 'fresh_state', fresh))

  def noting_batches(self) -> list[bool]:
    """Whether the model reads the byte, step by step, as the run goes."""
    seen, original = [], datalib.Batches.next

    def noted(batches, *args):
      batch = original(batches, *args)
      seen.append(bool((batch['tokens'][:, :-1] == _POISON).any()))
      return batch

    self.enter_context(mock.patch.object(datalib.Batches, 'next', noted))
    return seen

  def run_poisoned(self, steps: int = _STEPS, **changes) -> loop.Run:
    made = runs.config(self.home, steps, checkpoint_every=0, **changes)
    return loop.fit(made, self.folder / 'run', console=False)

  def test_a_run_with_batches_of_nan_stays_finite_and_learns(self):
    self.check_run_with(np.nan)

  @parameterized.parameters(np.inf, 1e4)
  @pytest.mark.slow
  def test_a_run_with_such_batches_stays_finite_and_learns(self, value):
    self.check_run_with(value)

  def check_run_with(self, value: float):
    seen = self.noting_batches()
    self.poisoned(value)
    with ledger.fault(f'batches of {value}', 1):
      run = self.run_poisoned()
      rows = metrics.read(self.folder / 'run')
      skipped = np.diff([0, *(row['skipped'] for row in rows)]).astype(bool)
      self.assertBetween(sum(seen), 2, _STEPS // 2)
      if np.isfinite(value):
        # Norms take the offset away: such a batch is fit to be applied.
        self.assertTrue(all(np.isfinite(row['loss']) for row in rows))
        self.assertFalse(any(skipped & ~np.array(seen)))
      else:
        self.assertEqual(skipped.tolist(), seen)
      for name, leaf in jax.tree_util.tree_leaves_with_path(run.state.params):
        leaf = np.asarray(leaf)
        if jax.tree_util.keystr(name) == "['embed']":
          leaf = np.delete(leaf, _POISON, axis=0)
        self.assertTrue(np.isfinite(leaf).all(), msg=name)
      losses = [row['loss'] for row, bad in zip(rows, skipped) if not bad]
      self.assertLess(np.mean(losses[-5:]), losses[0] - 0.5)

  def test_the_step_that_ended_a_run_can_be_repeated(self):
    seen = self.noting_batches()
    self.poisoned(np.nan)
    with ledger.fault('a poisoned batch ends the run'):
      with self.assertRaisesRegex(RunAborted, '1 updates in a row'):
        self.run_poisoned(**{'train.gate.patience': 1, 'safety.last_steps': 3})
      bad = len(seen)
      self.assertEqual(seen, [False] * (bad - 1) + [True])
      rows = last_steps.read(self.folder / 'run')
      self.assertEqual(
        [row['step'] for row in rows], list(range(max(bad - 2, 1), bad + 1))
      )
      before, last = rows[-2:]
      self.assertTrue(np.isfinite([before['loss'], before['grad_norm']]).all())
      choices = runs.ROWS * runs.LENGTH * 2
      self.assertEqual(np.sum(before['load'], axis=-1).tolist(), [choices])
      norms = last['block_norms']
      self.assertTrue(np.isnan(norms['segments.0.0']).all())
      self.assertTrue(np.isfinite(before['block_norms']['segments.0.0']).all())

      again = list(replay.replay(self.folder / 'run', bad))[-1]
      self.assertTrue(np.isnan(again.loss))
      self.assertTrue(again.same)
      self.assertEqual(again.batch, last['batch'])
      np.testing.assert_array_equal(again.block_norms['embed'], norms['embed'])

  @pytest.mark.slow
  def test_another_batch_under_the_same_number_is_seen(self):
    self.poisoned(np.nan)
    with self.assertRaises(RunAborted):
      self.run_poisoned(**{'train.gate.patience': 1})
    original = datalib.Batches.next

    def other(batches, *args):
      batch = original(batches, *args)
      return batch | {'tokens': batch['tokens'][::-1].copy()}

    step = last_steps.read(self.folder / 'run')[-1]['step']
    with mock.patch.object(datalib.Batches, 'next', other):
      self.assertFalse(list(replay.replay(self.folder / 'run', step))[-1].same)


if __name__ == '__main__':
  absltest.main()
