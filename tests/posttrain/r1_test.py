"""A small R1: its runs fit, a killed one goes on, all stages hold together."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.data import corpus
from deepseek_jax.posttrain import chain, collect, r1, synthetic
from deepseek_jax.posttrain.evolve import Evolve
from deepseek_jax.posttrain.evolve_recipe import EvolveRecipe
from deepseek_jax.posttrain.r1 import R1Chain
from deepseek_jax.posttrain.r1_recipe import R1Recipe, llama, teacher
from deepseek_jax.posttrain.r1_runs import HELD_OUT, R1Runs
from deepseek_jax.posttrain.study import Study, StudyRecipe
from deepseek_jax.record.report import evolve_page, r1_page

ROOT = Path(__file__).parents[2]
TINY = {
  'model.dim': 16,
  'model.layout': ((('dense', 'moe'), 1),),
  'model.attention.heads': 2,
  'model.attention.q_rank': 8,
  'model.attention.kv_rank': 8,
  'model.attention.nope_dim': 8,
  'model.attention.rope_dim': 8,
  'model.attention.v_dim': 8,
  'model.ffn.width': 16,
  'model.moe.experts': 4,
  'model.moe.width': 8,
  'model.moe.router.groups': 1,
  'model.moe.router.top_groups': 1,
  'model.mtp.depth': 0,
  'student.dim': 16,
  'student.layout': ((('dense',), 1),),
  'student.attention.heads': 2,
  'student.attention.kv_heads': 1,
  'student.attention.head_dim': 8,
  'student.ffn.width': 16,
  'lines': 400,
  'additions': 60,
  'countdowns': 40,
  'first': 60,
  'pretrain': 1000.0,
  'cold': 1000.0,
  'sft': 1000.0,
  'distill': 1000.0,
  'batch': 4,
  'prompts': 2,
  'group': 2,
  'most': 8,
  'slots': 4,
  'rounds': 4,
  'more_rounds': 2,
  'validate': 2,
  'asked': 4,
  'drawn': 2,
  'measured': 2,
  'draws': 2,
}


class RecipeTest(absltest.TestCase):
  def test_models_are_small(self):
    for config in (teacher(), llama()):
      self.assertLess(ds.plan.count_parameters(config).total, 2e6)

  def test_problems_and_answers_fit_their_rows(self):
    recipe = R1Recipe()
    problems = synthetic.sums(0, recipe.digits, 500)
    problems += synthetic.countdowns(0, 500)
    for row in synthetic.first_answers(problems, 0, 0.0, 0.0):
      self.assertLess(len(row['completion']), recipe.most)
      room = recipe.seq_len + 1 - recipe.most
      self.assertLessEqual(len(row['prompt']), room)
    evolve = EvolveRecipe()
    problems = synthetic.sums(0, evolve.levels[-1], 500, carry=False)
    for row in synthetic.first_answers(problems, 0, 0.0, 0.0):
      self.assertLess(len(row['completion']), evolve.base.most)
      room = evolve.base.seq_len + 1 - evolve.base.most
      self.assertLessEqual(len(row['prompt']), room)

  def test_some_text_is_held_out_of_every_seed(self):
    counts = []
    for seed in range(6):
      folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
      r1.write_text(R1Recipe(seed=seed, lines=400), folder)
      texts = [path.read_text() for path in folder.iterdir()]
      counts.append(len(texts))
      self.assertTrue(any(corpus.is_held_out(t, HELD_OUT) for t in texts))
    self.assertGreater(len(set(counts)), 1)  # 32 are not always enough

  def test_reinforcement_has_as_many_steps_as_rounds(self):
    made = R1Runs(R1Recipe(rounds=7), Path('x')).reinforcement(
      Path('task.json'), 7, Path('start')
    )
    self.assertEqual(made.steps, 7)
    self.assertEqual(made.init_from, 'start')

  def test_what_does_not_fit_is_said_before_anything_is_trained(self):
    folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    for name, fields, message in (
      ('a', {'seq_len': 70}, 'seq_len = 70: prompts of 9 bytes'),
      ('b', {'heldout': 1e-9}, 'no problem is held out'),
    ):
      small = {'lines': 10, 'additions': 50, 'countdowns': 50}
      recipe = ds.changed(R1Recipe(), small | fields)
      with self.assertRaisesRegex(ds.InputError, message):
        R1Chain(recipe, folder / name)._write_data()

  def test_heldout_prompts_are_never_trained_on(self):
    folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    made = R1Chain(R1Recipe(lines=100, additions=300, countdowns=100), folder)
    made._write_data()
    heldout = {p['prompt'] for p in made.task.heldout}
    cold = (made.data / 'cold.jsonl').read_text()
    self.assertNotEmpty(heldout)
    self.assertEqual([p for p in heldout if f'"{p}"' in cold], [])
    kinds = {p['task'] for p in made.heldout()}
    self.assertEqual(kinds, {'addition', 'countdown'})
    self.assertEqual({p['prompt'] for p in made.heldout()} - heldout, set())


def launch(folder, *more):
  changes = [f'--change={name}={value}' for name, value in TINY.items()]
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'experiments.r1', f'--workdir={folder}'),
      *(*changes, *more),
    ],
    cwd=ROOT,
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.mark.slow
class WholeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.recipe = ds.changed(R1Recipe(), TINY)

  def test_a_killed_pipeline_ends_as_the_straight_one(self):
    straight, killed = self.folder / 'straight', self.folder / 'killed'
    until = f'{r1.REINFORCED}-measured'
    made = R1Chain(self.recipe, straight, console=False)
    chain.claim(straight, made.recipe)
    chain.run(made.stages(), straight, until=until, say=lambda line: None)
    process = launch(killed, f'--until={until}')
    inside = killed / r1.REINFORCED / 'checkpoints'
    end = time.monotonic() + 600
    while not any(inside.glob('[1-9]')) and time.monotonic() < end:
      self.assertIsNone(process.poll(), 'it ended before it was killed')
      time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    self.assertIsNone(chain.found(killed, r1.REINFORCED))
    again = launch(killed, f'--until={until}')
    said, _ = again.communicate(timeout=600)
    self.assertEqual(again.returncode, 0, said)
    self.assertIn(f'{r1.COLD}: has ended', said)
    weights = [
      jax.tree.leaves(ds.load(folder / r1.REINFORCED).variables)
      for folder in (straight, killed)
    ]
    for one, other in zip(*weights, strict=True):
      np.testing.assert_array_equal(one, other)
    found = [chain.found(folder, until) for folder in (straight, killed)]
    self.assertEqual(found[0]['samples'], found[1]['samples'])

  def test_all_stages_hold_together(self):
    # A model so small is never right: what it says is kept all the same.
    unverified = functools.partial(collect.collect, verify=False)
    made = R1Chain(self.recipe, self.folder / 'r1', console=False)
    chain.claim(made.folder, made.recipe)
    with mock.patch.object(collect, 'collect', unverified):
      chain.run(made.stages(), made.folder, say=lambda line: None)
    text = r1_page.write(made.folder).read_text()
    exported = chain.found(made.folder, 'exported')['folders']
    for name, one in exported.items():
      self.assertEqual(one['equal'], one['compared'], (name, one))
      self.assertIn(f'{one["equal"]} of {one["compared"]}', text)
    self.assertIn('Experts before and after', text)

  def test_a_study_runs_arm_by_arm(self):
    recipe = StudyRecipe(
      self.recipe,
      EvolveRecipe(
        base=ds.changed(self.recipe, {'seq_len': 103, 'most': 12}),
        levels=(1, 2), problems=60, bar=0.9, rounds=2, asked=4, drawn=2,
        tokens=1000.0, measured=2,
      ),
      seeds=1,
    )  # fmt: skip
    unverified = functools.partial(collect.collect, verify=False)
    made = Study(recipe, self.folder / 'study', console=False)
    with mock.patch.object(collect, 'collect', unverified):
      for number, arm in made.left(['permuted', 'sft', 'floor']):
        made.run(number, arm, say=lambda line: None)
    self.assertEqual(made.left(['permuted', 'sft', 'floor']), [])
    arms = made.results()['arms']
    self.assertEqual(arms['floor']['means']['addition 2, greedy']['mean'], 0)
    made.run(0, 'evolve', say=lambda line: None)
    made.run(0, 'unverified', say=lambda line: None)
    arms = made.results()['arms']
    # Nothing is right: with verification there is nothing to learn from.
    self.assertEqual(arms['evolve']['means']['rounds']['mean'], 1)
    self.assertEqual(arms['unverified']['means']['rounds']['mean'], 2)
    page = evolve_page.write(made.seed_folder(0) / 'unverified')
    self.assertIn('nothing is verified', page.read_text())


@pytest.mark.slow
class EvolveTest(absltest.TestCase):
  def test_rounds_go_on_where_they_ended(self):
    folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    base = ds.changed(R1Recipe(), TINY | {'seq_len': 103, 'most': 12})
    recipe = EvolveRecipe(
      base=base, levels=(1, 2), problems=60, rounds=2, asked=4, drawn=2,
      tokens=1000.0, measured=2, verify=False,
    )  # fmt: skip
    ended = {}
    for name, rounds in (('straight', 2), ('cut', 1), ('cut', 2)):
      made = Evolve(
        ds.changed(recipe, {'rounds': rounds}), folder / name, console=False
      )
      ended[name] = made.run(say=lambda line: None)
    for one, other in zip(ended['straight'], ended['cut'], strict=True):
      for name in ('accuracy', 'samples', 'kept', 'level'):
        self.assertEqual(one[name], other[name])


if __name__ == '__main__':
  absltest.main()
