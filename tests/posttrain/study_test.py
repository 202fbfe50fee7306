"""A study: what is left, how long it takes, what is written of it."""

import dataclasses
import tempfile
from pathlib import Path

from absl.testing import absltest

from deepseek_jax.posttrain import chain, study
from deepseek_jax.posttrain.study import Study, StudyRecipe


def reached(share):
  one = {'greedy': share, 'pass': {'1': share, '16': 1.0}}
  return {'kinds': {'sums': one}}


class StudyTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.study = Study(StudyRecipe(), self.folder)

  def ended(self, number, arm, seconds=60.0, **values):
    folder = self.study.seed_folder(number)
    record = {'seconds': seconds, 'number': 1, **values}
    chain.write(folder / 'stages' / f'arm-{arm}.json', record)

  def test_what_is_left_comes_by_value_seed_by_seed(self):
    arms = list(study.ARMS)
    self.assertLen(self.study.left(arms), 12)
    self.assertEqual(self.study.left(arms)[0], (0, 'grpo'))
    self.ended(0, 'grpo', reached=reached(0.9))
    self.assertEqual(
      self.study.left(['grpo', 'floor']),
      [(0, 'floor'), (1, 'grpo'), (1, 'floor')],
    )

  def test_the_estimate_learns_from_what_ran(self):
    first = self.study.seconds(['grpo'])
    each = study.SECONDS['grpo'] + study.SECONDS['start']
    self.assertEqual(first, 2 * each)
    self.ended(0, 'grpo', seconds=10.0, reached=reached(0.9))
    left = self.study.seconds(['grpo'])
    self.assertEqual(left, 10.0 + study.SECONDS['start'])

  def test_results_are_paired_by_seed(self):
    for number, (grpo, permuted) in enumerate(((0.9, 0.1), (0.8, 0.2))):
      self.ended(number, 'grpo', reached=reached(grpo))
      self.ended(number, 'permuted', reached=reached(permuted))
    self.ended(1, 'sft', reached=reached(0.5))
    levels = {
      'start': {'2': 0.9, '3': 0.1},
      'accuracy': {'2': 0.9, '3': 0.8},
      'levels': 2,
      'rounds': 3,
    }
    self.ended(0, 'evolve', **levels)
    found = self.study.results()
    mean = found['arms']['grpo']['means']['sums, greedy']
    self.assertAlmostEqual(mean['mean'], 0.85)
    # Student's t of two values: 12.706 standard errors.
    self.assertAlmostEqual(mean['half'], 12.7062 * 0.05, places=4)
    less = found['from_grpo']
    self.assertAlmostEqual(less['permuted']['sums, greedy']['mean'], -0.7)
    # The second seed alone has both.
    self.assertAlmostEqual(less['sft']['sums, greedy']['mean'], -0.3)
    self.assertIsNone(less['sft']['sums, greedy']['half'])
    self.assertEqual(less['floor'], {})
    text = study.markdown(found)
    self.assertIn('| evolve (self-improvement with verification) | 0.9 |', text)
    self.assertIn('0.85 ± 0.64 (0.90, 0.80)', text)
    self.assertIn('permuted (control: rewards dealt out at random)', text)

  def test_nothing_run_is_said(self):
    text = study.markdown(self.study.results())
    self.assertIn('evolve, unverified: not run.', text)

  def test_seeds_have_folders_and_recipes_of_their_own(self):
    recipe = dataclasses.replace(
      StudyRecipe(), r1=dataclasses.replace(StudyRecipe().r1, seed=5)
    )
    made = Study(recipe, self.folder)
    self.assertEqual(made.seed_folder(1).name, 'seed=6')


if __name__ == '__main__':
  absltest.main()
