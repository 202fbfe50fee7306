"""Runs that share their compiled steps: those of equal models and recipes."""

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.run.steps import Steps, shared_programs


def programs(**changes):
  """Returns where the steps of a small run keep their programs."""
  config = ds.changed(ds.recipes.v3_tiny(), {'model.dim': 32})
  dotted = {name.replace('__', '.'): v for name, v in changes.items()}
  config = ds.changed(config, dotted)
  return Steps(ds.build(config.model), config)._compiled


class SharedProgramsTest(parameterized.TestCase):
  def test_seeds_share(self):
    with shared_programs():
      self.assertIs(programs(), programs(seed=1, data__seed=1))

  @parameterized.parameters(
    {'train__schedule__peak': 1e-4},
    {'train__tokens': 1e5},
    {'model__moe__top_k': 2},
    {'data__seq_len': 128},
  )
  def test_what_changes_a_step_does_not(self, **changes):
    with shared_programs():
      first = programs()
      self.assertIsNot(first, programs(**changes))

  def test_nothing_is_shared_unasked(self):
    self.assertIsNot(programs(), programs())
    with shared_programs():
      inside = programs()
      with shared_programs():
        self.assertIsNot(inside, programs())
      self.assertIs(inside, programs())
    self.assertIsNot(inside, programs())


if __name__ == '__main__':
  absltest.main()
