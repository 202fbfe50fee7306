"""Problems, the teacher's answers and the text of a small R1."""

import collections
import random
import re

from absl.testing import absltest, parameterized

from deepseek_jax.posttrain import synthetic
from deepseek_jax.rl.grading import extract, rewards

COUNTDOWN = rewards.read([{'kind': 'countdown'}], 'here')[0]


class SumsTest(parameterized.TestCase):
  @parameterized.parameters(1, 2, 3, 6)
  def test_a_thought_with_carries_is_the_sum(self, digits):
    for problem in synthetic.sums(3, digits, 40, carry=False):
      said = synthetic.first_sum(problem, random.Random(0), 0.0)
      self.assertEqual(extract.answer(said, 'answer'), problem['answer'])
      self.assertTrue(extract.is_in_form(said))
      left, right = map(int, problem['prompt'].rstrip('=').split('+'))
      self.assertEqual(int(problem['answer']), left + right)
      # Every step of the thought holds, too.
      for step, total in re.findall(r'([\d+]+)=(\d+)', extract.reasoning(said)):
        self.assertEqual(sum(map(int, step.split('+'))), int(total))

  def test_a_forgotten_carry_is_wrong_and_in_form(self):
    for problem in synthetic.sums(0, 2, 60):
      said = synthetic.first_sum(problem, random.Random(0), 1.0)
      self.assertNotEqual(extract.answer(said, 'answer'), problem['answer'])
      self.assertTrue(extract.is_in_form(said))

  def test_as_many_are_wrong_as_is_asked_for(self):
    problems = synthetic.sums(0, 2, 2000) + synthetic.countdowns(0, 600)
    said = list(synthetic.first_answers(problems, 1, 0.65, 0.75))
    right = {'addition': [], 'countdown': []}
    for problem, row in zip(problems, said):
      text = row['completion']
      if problem['task'] == 'addition':
        good = extract.answer(text, 'answer') == problem['answer']
      else:
        good = COUNTDOWN(text, problem) == 1
      right[problem['task']].append(good)
    share = {task: sum(good) / len(good) for task, good in right.items()}
    self.assertAlmostEqual(share['addition'], 0.35, delta=0.04)
    self.assertAlmostEqual(share['countdown'], 0.25, delta=0.06)
    again = list(synthetic.first_answers(problems, 1, 0.65, 0.75))
    self.assertEqual(said, again)
    other = list(synthetic.first_answers(problems, 2, 0.65, 0.75))
    self.assertNotEqual(said, other)


class CountdownTest(absltest.TestCase):
  def test_what_the_teacher_finds_is_right(self):
    for problem in synthetic.countdowns(5, 100):
      said = synthetic.first_countdown(problem, random.Random(1), 0.0)
      self.assertEqual(COUNTDOWN(said, problem), 1.0, said)

  def test_what_it_misses_is_honest(self):
    """The steps hold; only the target is another."""
    for problem in synthetic.countdowns(5, 100):
      said = synthetic.first_countdown(problem, random.Random(1), 1.0)
      for step, value in re.findall(
        r'(\d+[+-]\d+)=(-?\d+)', extract.reasoning(said)
      ):
        a, b = re.split('[+-]', step)
        made = int(a) + int(b) if '+' in step else int(a) - int(b)
        self.assertEqual(made, int(value))


class OtherColumnsTest(absltest.TestCase):
  def test_they_are_right_in_form_and_no_sums(self):
    rows = list(synthetic.other_columns(0, 400))
    self.assertEqual(rows, list(synthetic.other_columns(0, 400)))
    asked, longer = collections.defaultdict(set), 0
    for row in rows:
      left, sign, right = re.split(r'([^\d=])', row['prompt'].rstrip('='))
      pairs = [(int(a), int(b)) for a, b in zip(left, right)]
      want = {
        '#': [a if a > b else b for a, b in pairs],
        '%': [b if a > b else a for a, b in pairs],
        '&': [a for a, _ in pairs],
        '-': [a - b if a > b else b - a for a, b in pairs],
        '*': [a + a for a, _ in pairs],
      }[sign]
      ones = [str(one % 10) for one in want]
      tens = str(want[0] // 10 or '')
      self.assertEqual(extract.answer(row['completion'], 'answer'),
                       tens + ''.join(ones))  # fmt: skip
      longer += len(ones) > 2 and bool(tens)
      self.assertTrue(extract.is_in_form(row['completion']))
      self.assertNotIn('+', row['completion'])
      thought = extract.reasoning(row['completion']).split()
      told = [f'{a}{sign}{b}={c}' for (a, b), c in zip(pairs, want)]
      self.assertEqual(thought, told[::-1])
      asked[sign].add(len(left))
    self.assertLen(asked, 5)
    self.assertGreater(longer, 5)
    self.assertEqual({len(n) for n in asked.values()}, {synthetic.LONGEST})


class PlacesTest(absltest.TestCase):
  def test_a_thought_finds_the_digits_of_each_place(self):
    rng, lowest = random.Random(0), set()
    for problem in synthetic.sums(0, 4, 100, carry=False):
      said = synthetic.first_sum(problem, random.Random(0), 0.0)
      row = synthetic.with_places({**problem, 'completion': said}, rng)
      self.assertRegex(row['prompt'], r'^([a-z]\d){4} ([A-Z]\d){4}\+$')
      self.assertEqual('+'.join(re.sub('[^0-9 ]', '', row['prompt']).split()),
                       problem['prompt'].rstrip('='))  # fmt: skip
      digits = dict(re.findall(r'([a-zA-Z])(\d)', row['prompt']))
      self.assertEqual(extract.answer(row['completion'], 'answer'),
                       problem['answer'])  # fmt: skip
      thought = extract.reasoning(row['completion'])
      steps = re.findall(r'([a-z])(\d)\+([A-Z])(\d)=([01])(\d)', thought)
      # From the lowest place, which is the number's last.
      self.assertEqual([s[0] for s in steps], list(digits)[3::-1])
      lowest.add(steps[0][0])
      carried = 0
      for low, a, high, b, carry, one in steps:
        self.assertEqual(low.upper(), high)
        self.assertEqual((a, b), (digits[low], digits[high]))
        total = int(a) + int(b) + carried
        carried = int(carry)
        self.assertEqual(total, 10 * carried + int(one))
    self.assertGreater(len(lowest), 15)

  def test_other_columns_look_alike(self):
    row = {'prompt': '18#35=', 'completion': '<think>8#5=8 1#3=3</think>'}
    told = synthetic.with_places(row, random.Random(0))
    low = told['prompt'][2]
    high = chr(ord(low) + 1)
    want = f'{high}1{low}8 {high.upper()}3{low.upper()}5#'
    self.assertEqual(told['prompt'], want)
    self.assertEqual(
      told['completion'],
      f'<think>{low}8#{low.upper()}5=08 {high}1#{high.upper()}3=03</think>',
    )
    row = {'prompt': '8*5=', 'completion': '<think>8*5=16</think>'}
    told = synthetic.with_places(row, random.Random(0))['completion']
    self.assertRegex(told, r'^<think>([a-z])8\*[A-Z]5=16</think>$')


class TextTest(absltest.TestCase):
  def test_no_line_asks_for_a_sum_of_several_columns(self):
    text = synthetic.text(0, 4000)
    self.assertEqual(re.findall(r'\d\d+\+\d\d+=', text), [])
    self.assertEqual(text.count('\n'), 4000)
    self.assertEqual(text, synthetic.text(0, 4000))
    self.assertNotEqual(text, synthetic.text(1, 4000))
    # Columns of as many digits as the curriculum has, and more.
    longest = max(len(n) for n in re.findall(r'(\d+)\+\d+: ', text))
    self.assertEqual(longest, synthetic.LONGEST)

  def test_columns_run_from_the_lowest(self):
    self.assertEqual(synthetic.columns('123', '456'), ['3+6', '2+5', '1+4'])


if __name__ == '__main__':
  absltest.main()
