"""Self-improvement: levels, lessons, faults of a task."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

from absl.testing import absltest, parameterized

from deepseek_jax.data.config import DataConfig
from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain, evolve
from deepseek_jax.posttrain.evolve import Evolve
from deepseek_jax.posttrain.evolve_recipe import EvolveRecipe
from deepseek_jax.rl.sft import SFTConfig

_SFT = SFTConfig()


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

  def test_a_lesson_has_its_level_and_some_of_what_came_before(self):
    made = Evolve(EvolveRecipe(replayed=3), self.folder)
    made._levels = [2, 3, 4, 5]
    kept = self.folder / 'kept'
    row = lambda text: {'prompt': text, 'completion': 'x'}
    rows = lambda name: [row(f'{name} {n}') for n in range(5)]
    made._taught = self.folder / 'first.jsonl'
    chain.write_lines(made._taught, rows('first'))
    for name, level in (
      ('level-2', 2), ('round-01', 3), ('round-02', 3), ('round-03', 4),
      ('round-04', 4), ('round-05', 4),
    ):  # fmt: skip
      # One problem is asked in every round.
      again = {'prompt': 'again', 'completion': name}
      chain.write_lines(kept / f'{name}.jsonl', [*rows(name), again])
      chain.write(kept / f'{name}.json', {'level': level, 'kept': 6})
    path = kept / 'round-04-lesson.jsonl'
    count = made._write_lesson(path, 'round-04')
    told = [json.loads(row) for row in path.read_text().splitlines()]
    begins = [row['prompt'].rpartition(' ')[0] for row in told[:11]]
    self.assertEqual(count, 9)
    self.assertLen(told, 11 + 9)
    # All of its level so far, each problem by its newest answer.
    self.assertEqual(begins.count('round-03'), 5)
    self.assertEqual(begins.count('round-04'), 5)
    self.assertIn({'prompt': 'again', 'completion': 'round-04'}, told[:11])
    # The first lesson, a level that had no round, and the newest of level 3.
    for place, name in enumerate(('first', 'level-2', 'round-02')):
      for row in told[11 + 3 * place : 14 + 3 * place]:
        self.assertIn(name, row['prompt'] + row['completion'])
    made._write_lesson(path, 'round-04')
    lines = path.read_text().splitlines()
    self.assertEqual(told, [json.loads(line) for line in lines])

  def test_a_start_was_taught_conversations_or_nothing_that_is_replayed(self):
    lines = self.folder / 'first.jsonl'
    lines.touch()
    taught = lambda path, objective=_SFT: evolve._conversations(
      SimpleNamespace(data=DataConfig(path=str(path)), objective=objective)
    )
    self.assertEqual(taught(lines), lines)
    self.assertIsNone(taught(self.folder))
    self.assertIsNone(taught(self.folder / 'lost.jsonl'))
    self.assertIsNone(taught(lines, objective=None))


if __name__ == '__main__':
  absltest.main()
