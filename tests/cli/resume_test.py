"""Checks that runs of post-training go on by `resume`, and how they end."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.cli import post_training
from deepseek_jax.errors import InputError
from tests.rl.sft_run_test import Folder

ROOT = Path(__file__).parents[2]


class ResumeTest(parameterized.TestCase):
  def run_it(self, *args):
    return subprocess.run(
      [sys.executable, '-m', 'deepseek_jax.cli.main', *args],
      cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      capture_output=True,
      text=True,
    )

  def test_fine_tuning_goes_on_to_its_end_and_reports(self):
    folder = Folder(self)
    first, run = (Path(folder.path, name) for name in ('first', 'run'))
    ds.fit(folder.config(), first, console=False, until=4)
    shutil.copytree(first, run)  # this process holds the first
    done = self.run_it('resume', str(run))
    self.assertEqual(done.returncode, 0, done.stderr[-2000:])
    self.assertIn('held-out bits per byte of answers', done.stdout)
    self.assertTrue((run / 'checkpoints' / '6').is_dir())
    self.assertTrue((run / 'report.html').exists())

  @parameterized.parameters(
    ('v3_tiny', 'pretrain'),
    ('sft_tiny', 'sft'),
    ('grpo_tiny', 'grpo'),
    ('distill_tiny', 'distill'),
  )
  def test_every_recipe_has_its_launcher(self, recipe, name):
    config = getattr(ds.recipes, recipe)()
    self.assertEqual(post_training.launcher(config), name)
    if name == 'pretrain':
      post_training.check_text(config)
      return
    with self.assertRaisesRegex(InputError, f'experiments.{name}$'):
      post_training.check_text(config)

  def test_distillation_on_own_answers_is_no_grpo(self):
    config = ds.changed(
      ds.recipes.distill_tiny(), {'rollouts': ds.RolloutConfig(most=8)}
    )
    self.assertEqual(post_training.launcher(config), 'distill')

  @parameterized.parameters(
    ('pretrain', '--workdir'),
    ('sweep', '--folder', '--axis=train.tokens=1e4,2e4'),
  )
  def test_conversations_are_for_their_own_launcher(self, verb, flag, *more):
    there = self.enter_context(tempfile.TemporaryDirectory())
    done = self.run_it(verb, '--config=sft_tiny', f'{flag}={there}/a', *more)
    self.assertEqual(done.returncode, 2, done.stderr[-2000:])
    self.assertRegex(done.stderr, r'^error: chat = .* experiments\.sft\n$')


if __name__ == '__main__':
  absltest.main()
