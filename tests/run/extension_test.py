"""Runs that grow: allowed where no step so far would have been another."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.run import extension
from deepseek_jax.train import schedules

_LENGTH, _SIZE = 64, 4


def _run(kind='constant', tokens=100 * 256, ramp=0.0, **changes):
  run = ds.changed(
    ds.recipes.v3_tiny(),
    {
      'train.schedule.kind': kind,
      'train.schedule.warmup': 5,
      'train.tokens': float(tokens),
      'train.batch.size': _SIZE,
      'train.batch.start': 2 if ramp else 0,
      'train.batch.ramp_tokens': float(ramp),
      'data.seq_len': _LENGTH,
      **changes,
    },
  )
  return run


class ExtensionTest(parameterized.TestCase):
  @parameterized.parameters(0.0, 3000.0)
  def test_tokens_are_those_of_the_steps(self, ramp):
    run, tokens = _run(ramp=ramp), 0
    for step in range(30):
      self.assertEqual(extension.tokens_after(run, step), tokens)
      tokens += run.train.batch.at(tokens) * _LENGTH

  @parameterized.parameters(
    ('constant', 100, True),
    ('wsd', 60, True),  # decays from 0.6 on
    ('wsd', 62, False),
    ('v3', 67, True),  # constant to 10 of 14.8
    ('v3', 70, False),
    ('cosine', 2, False),
    ('v2', 50, True),
    ('v2', 62, False),
  )
  def test_a_schedule_that_has_not_moved_may_grow(self, kind, steps, allowed):
    run = _run(kind)
    if not allowed:
      with self.assertRaisesRegex(ds.InputError, 'has moved'):
        extension.extended(run, 200 * 256, steps)
      return
    grown = extension.extended(run, 200 * 256, steps)
    self.assertEqual(grown.train.tokens, 200 * 256)
    self.assertIsNone(extension.problem(run, grown, steps))
    # Every step so far has the numbers that it had.
    for step in range(steps):
      at = extension.tokens_after(run, step)
      for name in ('mtp_weight', 'bias_rate'):
        old, new = (
          float(getattr(r.train, name).at(at, r.train.tokens))
          for r in (run, grown)
        )
        self.assertEqual(old, new, (name, step))
      old, new = (
        float(
          schedules.learning_rate(r.train.schedule, step, at, r.train.tokens)
        )
        for r in (run, grown)
      )
      self.assertEqual(old, new, step)

  def test_what_has_switched_keeps_its_token(self):
    run = _run()
    grown = extension.extended(run, 400 * 256, 100)
    border = run.train.mtp_weight.until * run.train.tokens
    self.assertAlmostEqual(
      grown.train.mtp_weight.until * grown.train.tokens, border, delta=1e-6
    )

  def test_a_plain_change_of_tokens_that_moves_a_switch_is_told_how(self):
    run = _run()
    train = dataclasses.replace(run.train, tokens=200 * 256.0)
    why = extension.problem(run, dataclasses.replace(run, train=train), 100)
    self.assertIn('deepseek-jax resume', why)
    self.assertIsNone(
      extension.problem(run, dataclasses.replace(run, train=train), 60)
    )

  def test_fewer_tokens_than_are_trained_are_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'are trained already'):
      extension.extended(_run(), 50 * 256, 60)
    self.assertEqual(extension.extended(_run(), 60 * 256, 60).steps, 60)

  @parameterized.parameters(float('nan'), -1.0, 0.0)
  def test_a_number_that_is_none_is_refused(self, tokens):
    with self.assertRaises(ds.InputError):
      extension.extended(_run(), tokens, 0)
    self.assertFalse(np.isnan(_run().train.tokens))


if __name__ == '__main__':
  absltest.main()
