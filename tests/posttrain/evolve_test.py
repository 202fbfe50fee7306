"""Self-improvement: levels, lessons, faults of a task."""

import json
import tempfile
from pathlib import Path

from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain
from deepseek_jax.posttrain.evolve import Evolve
from deepseek_jax.posttrain.evolve_recipe import EvolveRecipe


class EvolveTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

  def task(self, levels, heldout=0.2):
    problems = self.folder / 'problems.jsonl'
    rows = [
      {'prompt': f'{n}+{level}=', 'answer': str(n), 'level': level}
      for level in levels
      for n in range(40)
    ]
    chain.write_lines(problems, rows)
    path = self.folder / 'task.json'
    spec = {'problems': 'problems.jsonl', 'rewards': [{'kind': 'exact'}]}
    chain.write(path, spec | {'heldout': heldout})
    return str(path)

  @parameterized.parameters(
    ((0.9, 0.9, 0.1), 0, 2),
    ((0.9, 0.1, 0.9), 0, 1),
    ((0.1, 0.9, 0.9), 0, 0),
    # A level that was passed stays so.
    ((0.1, 0.8, 0.9), 1, 3),
  )
  def test_the_first_level_below_the_bar_comes_next(self, shares, place, next_):
    made = Evolve(EvolveRecipe(bar=0.8), self.folder)
    made._levels = [2, 3, 5]
    record = {'accuracy': {str(l): s for l, s in zip(made._levels, shares)}}
    self.assertEqual(made._passed(record, place), next_)

  @parameterized.parameters((['two'],), ([True],), ([None],), ([2.0],))
  def test_a_level_is_a_whole_number(self, levels):
    recipe = EvolveRecipe(task=self.task(levels), start='somewhere')
    with self.assertRaisesRegex(InputError, "'level' = .*whole number"):
      Evolve(recipe, self.folder).run(say=lambda line: None)

  def test_a_level_without_a_heldout_problem_is_named(self):
    recipe = EvolveRecipe(task=self.task([4], 0.0), start='somewhere')
    with self.assertRaisesRegex(InputError, 'no problem of level 4 is held'):
      Evolve(recipe, self.folder).run(say=lambda line: None)

  @parameterized.parameters(
    ({'levels': (3, 2)}, 'levels = .3, 2.: must be whole numbers above 0'),
    ({'task': 'a.json'}, "task = 'a.json': needs a model"),
    ({'bar': 1.5}, 'bar = 1.5'),
    ({'rounds': 0}, 'rounds = 0'),
    ({'rounds': 100}, 'rounds = 100: must lie in 1..99'),
  )
  def test_a_recipe_that_makes_no_sense(self, fields, message):
    with self.assertRaisesRegex(InputError, message):
      EvolveRecipe(**fields)

  def test_a_level_that_was_never_asked_is_asked_before_it_is_left(self):
    made = Evolve(EvolveRecipe(replayed=3), self.folder)
    made._levels = [2, 3, 4]
    asked = []

    def collected(path, level, before):
      asked.append((path.name, level))
      chain.write_lines(path, [])
      return {'level': level, 'kept': 0}

    made._collected = collected
    kept = self.folder / 'kept'
    chain.write(kept / 'round-01.json', {'level': 3, 'kept': 2})
    made._answer_earlier(4, 'round-02', self.folder)
    self.assertEqual(asked, [('level-2.jsonl', 2)])
    made._answer_earlier(4, 'round-02', self.folder)
    self.assertLen(asked, 1)

  def test_a_lesson_has_some_of_every_earlier_level(self):
    made = Evolve(EvolveRecipe(replayed=3), self.folder)
    made._levels = [2, 3, 4, 5]
    kept = self.folder / 'kept'
    row = lambda text: {'prompt': text, 'completion': 'x'}
    for name, level in (
      ('level-2', 2), ('round-01', 3), ('round-02', 3), ('round-03', 4),
      ('round-04', 3),
    ):  # fmt: skip
      rows = [row(f'{name} {n}') for n in range(5)]
      chain.write_lines(kept / f'{name}.jsonl', rows)
      chain.write(kept / f'{name}.json', {'level': level, 'kept': 5})
    path = kept / 'round-03-lesson.jsonl'
    count = made._write_lesson(path, kept / 'round-03.jsonl', 'round-03')
    told = [json.loads(row)['prompt'] for row in path.read_text().splitlines()]
    begins = [text.rpartition(' ')[0] for text in told]
    self.assertEqual(count, 6)
    # All of this round, some of a level that had none, of level 3 the newest.
    self.assertEqual(begins.count('round-03'), 5)
    self.assertEqual(begins.count('level-2'), 3)
    self.assertEqual(begins.count('round-02'), 3)
    again = made._write_lesson(path, kept / 'round-03.jsonl', 'round-03')
    self.assertEqual(again, 6)
    rows = path.read_text().splitlines()
    self.assertEqual(told, [json.loads(row)['prompt'] for row in rows])


if __name__ == '__main__':
  absltest.main()
