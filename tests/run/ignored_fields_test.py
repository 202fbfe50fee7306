"""Checks that fields without effect are named at the start, and no others."""

import contextlib
import dataclasses
import io
import os

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import recipes
from deepseek_jax.run import ignored_fields
from tests.rl.sft_run_test import Folder

DISTILLED = dataclasses.replace(
  recipes.distill_tiny(), rollouts=ds.RolloutConfig()
)
RECIPES = {
  'v3': recipes.v3_tiny(),
  'v4': recipes.v4_tiny(),
  'sft': recipes.sft_tiny(),
  'grpo': recipes.grpo_tiny(),
  'distill': recipes.distill_tiny(),
  'distill on own answers': DISTILLED,
}


class IgnoredFieldsTest(parameterized.TestCase):
  @parameterized.parameters(*RECIPES)
  def test_a_recipe_has_none(self, name):
    self.assertEqual(ignored_fields.lines(RECIPES[name]), [])

  @parameterized.parameters(
    ('v3', 'train.batch.start', 2, 'ramp_tokens = 0'),
    ('v3', 'train.batch.increment', 2, 'ramp_tokens = 0'),
    ('sft', 'data.fim_rate', 0.5, 'conversations, of which nothing is cut'),
    ('sft', 'evaluate.stride', 3, 'reads each held-out answer whole'),
    ('sft', 'chat.thinking', False, "'plain' does not tell of thinking"),
    ('grpo', 'data.fim_rate', 0.5, 'a task, of which nothing is cut'),
    ('grpo', 'data.heldout_fraction', 0.5, "the task's own 'heldout'"),
    ('grpo', 'evaluate.batch', 3, 'answers the held-out problems'),
    ('grpo', 'rollouts.redraws', 1, 'dynamic_sampling = False'),
    ('distill on own answers', 'rollouts.permuted', True, 'every answer'),
    ('distill on own answers', 'rollouts.patience', 3, 'every answer'),
  )
  def test_field_value_and_reason_are_said(self, name, field, value, why):
    made = ignored_fields.lines(ds.changed(RECIPES[name], {field: value}))
    self.assertLen(made, 1)
    begin = f'{field} = {value!r}: is without effect, as '
    self.assertStartsWith(made[0], begin)
    self.assertIn(why, made[0])

  @parameterized.parameters(
    ('v3', {'train.batch.start': 8}),  # as large as all the others
    ('v3', {'train.batch.start': 2, 'train.batch.ramp_tokens': 1e4}),
    ('v3', {'data.fim_rate': 0.5, 'evaluate.stride': 3}),
    ('sft', {'chat.format': 'v4', 'chat.thinking': False}),
    ('grpo', {'rollouts.permuted': True, 'rollouts.patience': 3}),
    ('grpo', {'objective.dynamic_sampling': True, 'rollouts.redraws': 1}),
  )
  def test_what_has_an_effect_is_not_named(self, name, changes):
    self.assertEqual(
      ignored_fields.lines(ds.changed(RECIPES[name], changes)), []
    )

  def test_a_run_says_so_before_its_first_step(self):
    folder = Folder(self)
    config = folder.config(**{'evaluate.stride': 3, 'data.path': '/nowhere'})
    said = io.StringIO()
    with (
      contextlib.redirect_stderr(said),
      self.assertRaisesRegex(ds.InputError, 'does not exist'),
    ):
      ds.fit(config, os.path.join(folder.path, 'run'), console=False)
    self.assertIn('evaluate.stride = 3: is without effect', said.getvalue())


if __name__ == '__main__':
  absltest.main()
