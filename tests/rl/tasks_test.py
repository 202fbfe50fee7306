"""Tasks are files: makers, held-out prompts, faults that are named."""

import json
import os
import shutil
import tempfile
from typing import ClassVar

from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.rl import makers, tasks
from deepseek_jax.rl.grading import rewards, worker

EXACT = [{'kind': 'exact', 'place': 'all'}]


class TasksTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def write(self, name, value):
    path = os.path.join(self.folder, name)
    with open(path, 'w') as file:
      if name.endswith('.jsonl'):
        file.writelines(f'{json.dumps(v)}\n' for v in value)
      else:
        file.write(value if isinstance(value, str) else json.dumps(value))
    return path

  def lines(self, count, name='a.jsonl'):
    made = [{'prompt': f'{n}+0=', 'answer': str(n)} for n in range(count)]
    return self.write(name, made)

  def test_a_task_is_ten_lines(self):
    self.lines(1000)
    path = self.write(
      'task.json', {'problems': 'a.jsonl', 'rewards': EXACT, 'form': 'Q: {}'}
    )
    task = tasks.read(path)
    self.assertLen(task.train + task.heldout, 1000)
    self.assertBetween(len(task.heldout), 70, 130)
    self.assertTrue(task.train[0]['prompt'].startswith('Q: '))
    self.assertEqual(tasks.read(path).sha256, task.sha256)

  def test_a_byte_order_mark_is_no_part_of_it(self):
    recipe = {'maker': 'sorting', 'count': 9}
    spec = {'problems': recipe, 'rewards': EXACT, 'heldout': 0}
    path = self.write('task.json', '\ufeff' + json.dumps(spec))
    self.assertLen(tasks.read(path).train, 9)

  def test_a_prompt_is_on_one_side_however_often_it_stands(self):
    twice = [{'prompt': f'{n % 50}', 'answer': str(n)} for n in range(200)]
    self.write('a.jsonl', twice)
    spec = {'problems': 'a.jsonl', 'rewards': EXACT, 'heldout': 0.5}
    task = tasks.read(self.write('task.json', spec))
    sides = [{p['prompt'] for p in s} for s in (task.train, task.heldout)]
    self.assertEqual(sides[0] & sides[1], set())
    self.assertLen(sides[0] | sides[1], 50)

  def test_spaces_do_not_tell_prompts_apart(self):
    forms = '{} + 1 =', '{}  + 1 =', ' {} + 1  ='
    rows = [
      {'prompt': form.format(n), 'answer': str(n + 1)}
      for n in range(100)
      for form in forms
    ]
    spec = {'problems': 'a.jsonl', 'rewards': EXACT, 'heldout': 0.3}
    kept = []
    for order in (rows, rows[::-1]):
      self.write('a.jsonl', order)
      task = tasks.read(self.write('task.json', spec))
      key = lambda p: ' '.join(p['prompt'].split())
      train, heldout = ({key(p) for p in s} for s in (task.train, task.heldout))
      self.assertEqual(train & heldout, set())
      self.assertBetween(len(heldout), 15, 45)
      kept.append(heldout)
    self.assertEqual(*kept)

  def test_files_that_overlap_are_refused(self):
    self.lines(5)
    self.write('b.jsonl', [{'prompt': ' 3+0=', 'answer': '3'}])
    spec = {'problems': 'a.jsonl', 'rewards': EXACT, 'heldout': 'b.jsonl'}
    with self.assertRaisesRegex(
      InputError, '1 prompts are trained on and held'
    ):
      tasks.read(self.write('task.json', spec))

  @parameterized.parameters(
    ('{', 'is no file of JSON'),
    ('[]', 'must hold a JSON object'),
    ('{"rewards": 1, "rewards": 2}', "'rewards' stands twice"),
    ({'rewards': EXACT}, 'problems is missing'),
    ({'problems': 'a.jsonl'}, 'rewards is missing'),
    ({'problems': 'a.jsonl', 'rewards': EXACT, 'x': 1}, 'x: no such field'),
    ({'problems': 'b.jsonl', 'rewards': EXACT}, 'b.jsonl: cannot be read'),
    ({'problems': 3, 'rewards': EXACT}, 'problems must be a file'),
    (
      {'problems': 'a.jsonl', 'rewards': [{'kind': 'countdown'}]},
      "line 1: has no 'numbers'",
    ),
    (
      {'problems': 'a.jsonl', 'rewards': EXACT, 'heldout': 1.0},
      'heldout = 1.0',
    ),
    (
      {'problems': 'a.jsonl', 'rewards': EXACT, 'heldout': True},
      'heldout = True',
    ),
    ({'problems': 'a.jsonl', 'rewards': EXACT, 'form': 'x'}, "form = 'x'"),
    (
      {'problems': {'maker': 'x', 'count': 1}, 'rewards': EXACT},
      "maker = 'x'",
    ),
    (
      {'problems': {'maker': 'addition'}, 'rewards': EXACT},
      'count = None',
    ),
    (
      {'problems': {'maker': 'addition', 'count': 1, 'x': 2}, 'rewards': EXACT},
      'addition: .*unexpected keyword',
    ),
    (
      {
        'problems': {'maker': 'addition', 'count': 500, 'digits': 1},
        'rewards': EXACT,
      },
      'only 100 different problems',
    ),
  )
  def test_what_is_wrong_is_named(self, spec, message):
    self.lines(5)
    with self.assertRaisesRegex(InputError, message):
      tasks.read(self.write('task.json', spec))

  @parameterized.parameters(
    ([{'answer': 'a'}], "line 1: 'prompt' = None"),
    ([{'prompt': 'a', 'answer': 'b'}, {'prompt': 'a'}], "line 2: has no 'answ"),
    ([3], 'line 1: must be an object'),
    ([], 'holds no problem'),
    ([{'prompt': 'a', 'answer': float('nan')}], 'NaN is no number of JSON'),
  )
  def test_a_line_that_is_wrong_is_named(self, lines, message):
    self.write('a.jsonl', lines)
    spec = {'problems': 'a.jsonl', 'rewards': EXACT}
    with self.assertRaisesRegex(InputError, message):
      tasks.read(self.write('task.json', spec))


class MakersTest(parameterized.TestCase):
  @parameterized.parameters(
    ('addition', 'arithmetic', {'digits': 3}),
    ('countdown', 'countdown', {}),
    ('countdown', 'countdown', {'numbers': 4, 'signs': '+-*/'}),
    ('linear_code', 'code', {}),
    ('sorting', 'exact', {}),
  )
  def test_its_solutions_are_right(self, maker, kind, fields):
    (reward,) = rewards.read([{'kind': kind, 'place': 'all'}], 'x')
    recipe = {'maker': maker, 'count': 60, 'seed': 3, **fields}
    made = makers.problems(recipe, 'x')
    self.assertEqual(made, makers.problems(recipe, 'x'))
    self.assertLen({p['prompt'] for p in made}, 60)
    for problem in made:
      rewards.check([reward], problem, 'x')
      self.assertEqual(reward(problem['solution'], problem), 1.0, problem)
      self.assertEqual(reward('1234567', problem), 0.0)


class MixedTest(parameterized.TestCase):
  """Problems of several kinds in one task: 'only' says who scores whom."""

  REWARDS: ClassVar = (
    {'kind': 'exact', 'place': 'all', 'only': 'answer'},
    {'kind': 'countdown', 'place': 'all', 'only': 'numbers', 'weight': 2.0},
    {'kind': 'format', 'weight': 0.5},
  )
  SUM: ClassVar = {'prompt': '1+2=', 'answer': '3'}
  COUNT: ClassVar = {'prompt': '1 2=3:', 'numbers': [1, 2], 'target': 3}

  def test_a_reward_scores_the_problems_that_it_is_for(self):
    made = rewards.read(self.REWARDS, 'here')
    scores = lambda text, problem: [r(text, problem) for r in made]
    self.assertEqual(scores('3', self.SUM), [1.0, 0.0, 0.0])
    self.assertEqual(scores('1+2', self.COUNT), [0.0, 2.0, 0.0])
    for text, problem, right in (
      ('3', self.SUM, True),
      ('1+2', self.SUM, False),
      ('1+2', self.COUNT, True),
      ('3', self.COUNT, False),
    ):
      found = rewards.is_right(made, scores(text, problem), problem)
      self.assertEqual(found, right, (text, problem))

  def test_the_worker_scores_them_too(self):
    made = rewards.read(self.REWARDS, 'here')
    for text, problem, scores in (
      ('3', self.SUM, [1.0, 0.0, 0.0]),
      ('1+2', self.COUNT, [0.0, 2.0, 0.0]),
    ):
      line = json.dumps({'text': text, 'problem': problem})
      self.assertEqual(worker.answer(line, made), {'scores': scores})

  def test_a_reward_for_no_problem_is_named(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = os.path.join(folder, 'task.json')
    problems = {'maker': 'addition', 'count': 5}
    wrong = [{'kind': 'format'}, {'kind': 'exact', 'only': 'anser'}]
    with open(path, 'w') as file:
      json.dump({'problems': problems, 'rewards': wrong}, file)
    with self.assertRaisesRegex(
      InputError, "rewards.1..only = 'anser': no pro"
    ):
      tasks.read(path)

  def test_a_problem_that_none_scores_is_named(self):
    made = rewards.read(self.REWARDS[:2], 'here')
    with self.assertRaisesRegex(InputError, "has none of .*'answer'"):
      rewards.check(made, {'prompt': 'x'}, 'line 1')
    rewards.check(made, self.SUM, 'line 2')
    with self.assertRaisesRegex(InputError, "has no 'target'"):
      rewards.check(made, {'prompt': 'x', 'numbers': [1]}, 'line 3')
    with self.assertRaisesRegex(InputError, 'only = 3: must be a field'):
      rewards.read([{'kind': 'exact', 'only': 3}], 'here')

  def test_form_alone_solves_nothing(self):
    made = rewards.read(self.REWARDS, 'here')
    self.assertFalse(rewards.is_right(made, [0.0, 0.0, 0.5], self.SUM))
    form = rewards.read([{'kind': 'format'}], 'here')
    self.assertTrue(rewards.is_right(form, [1.0], self.SUM))  # all there is


if __name__ == '__main__':
  absltest.main()
