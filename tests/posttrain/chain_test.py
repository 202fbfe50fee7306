"""Stages run once, whoever ends the process."""

import dataclasses
import json
import tempfile
from pathlib import Path

from absl.testing import absltest

from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain
from deepseek_jax.posttrain.chain import ChainStage
from deepseek_jax.posttrain.r1_recipe import R1Recipe


class ChainTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.ran, self.said = [], []

  def stages(self, broken=None):
    def run(name):
      self.ran.append(name)
      if name == broken:
        raise RuntimeError(name)
      return {'value': len(self.ran)}

    return [
      ChainStage(name, f'does {name}', lambda name=name: run(name))
      for name in ('a', 'b', 'c')
    ]

  def run_all(self, **options):
    broken = options.pop('broken', None)
    chain.run(self.stages(broken), self.folder, say=self.said.append, **options)

  def test_what_has_ended_is_not_run_again(self):
    with self.assertRaisesRegex(RuntimeError, 'b'):
      self.run_all(broken='b')
    self.assertIsNone(chain.found(self.folder, 'b'))
    self.run_all()
    self.assertEqual(self.ran, ['a', 'b', 'b', 'c'])
    self.assertIn('1/3 a: has ended', self.said)
    record = chain.found(self.folder, 'c')
    self.assertEqual((record['number'], record['value']), (3, 4))
    self.run_all()
    self.assertLen(self.ran, 4)

  def test_it_may_end_after_a_stage(self):
    self.run_all(until='b')
    self.assertEqual(self.ran, ['a', 'b'])
    with self.assertRaisesRegex(InputError, "until = 'x': must be one of"):
      self.run_all(until='x')

  def test_seconds_of_earlier_launches_count(self):
    (self.folder / 'a').mkdir()
    line = json.dumps({'phase': 'step', 'seconds': 100.0})
    (self.folder / 'a' / 'timeline.jsonl').write_text(f'{line}\n{line}\n')
    self.run_all()
    self.assertGreater(chain.found(self.folder, 'a')['seconds'], 200)

  def test_a_folder_is_of_one_recipe(self):
    inside = self.folder / 'new'
    chain.claim(inside, R1Recipe())
    chain.claim(inside, R1Recipe())
    # A version that had a field less began it.
    recipe = json.loads((inside / 'recipe.json').read_text())
    del recipe['model']['compute']['cache']
    chain.write(inside / 'recipe.json', recipe)
    chain.claim(inside, R1Recipe())
    # As long as no stage has ended a wrong recipe can be put right.
    wrong = dataclasses.replace(R1Recipe(), rounds=9)
    chain.claim(inside, wrong)
    self.assertEqual(
      json.loads((inside / 'recipe.json').read_text())['rounds'], 9
    )
    chain.claim(inside, R1Recipe())
    chain.write(inside / 'stages' / 'data.json', {'name': 'data'})
    other = dataclasses.replace(R1Recipe(), rounds=7)
    told = f'rounds = {R1Recipe().rounds} there, 7 here'
    with self.assertRaisesRegex(InputError, told):
      chain.claim(inside, other)
    (self.folder / 'mine.txt').write_text('mine')
    with self.assertRaisesRegex(InputError, 'is not empty and holds no chain'):
      chain.claim(self.folder, R1Recipe())
    self.assertEqual((self.folder / 'mine.txt').read_text(), 'mine')


if __name__ == '__main__':
  absltest.main()
