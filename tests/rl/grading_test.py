"""Verifiers: right answers, near misses, tricks; texts of any kind."""

import random
from fractions import Fraction

from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.rl.grading import expression, extract, rewards, verifiers


def value(text, **names):
  return expression.evaluate(expression.parse(text), names)


class ExpressionTest(parameterized.TestCase):
  @parameterized.parameters(
    ('1+2*3', 7),
    ('(1+2)*3', 9),
    ('8-3-2', 3),
    ('12/4/3', 1),
    ('1/3+1/6', Fraction(1, 2)),
    ('2**3**2', 512),
    ('-2**2', -4),
    ('2**-1', Fraction(1, 2)),
    ('7//2+7%3', 4),
    ('--3', 3),
    ('0.1+0.2', Fraction(3, 10)),
    (' 6 × 7 ÷ 2 − 1 ', 20),
    ('3 if 1<2 else 1/0', 3),
    ('1 if not 2==2 and 1/0 else 4', 4),
    ('max(3, abs(-5), 2)', 5),
    ('min(1,2)+(3>2)', 2),
  )
  def test_value(self, text, want):
    self.assertEqual(value(text), want)

  def test_values_are_those_of_python(self):
    rng = random.Random(0)

    def drawn(depth):
      if not depth or rng.random() < 0.2:
        return str(rng.randrange(1, 9)) if rng.random() < 0.8 else 'x'
      a, b = drawn(depth - 1), drawn(depth - 1)
      kind = rng.choice(['+', '-', '*', '//', '%', '(', 'n', '<', 'if'])
      return {
        '(': f'({a})',
        'n': f'-{a}',
        '<': f'({a}<{b})',
        'if': f'({a} if {b} else {a})',
      }.get(kind, f'{a}{kind}({b})')

    for _ in range(500):
      text = drawn(5)
      try:
        want = eval(text, {'x': 3})
      except ZeroDivisionError:
        with self.assertRaisesRegex(expression.ExpressionError, 'divides by 0'):
          value(text, x=3)
      else:
        self.assertEqual(value(text, x=3), want, text)

  @parameterized.parameters(
    '',
    '1+',
    '(1',
    '1)',
    '1 2',
    '3 + * 4',
    '007',
    '1..2',
    '$',
    'a b',
    '1<2<3',
    '9**9**9',
    '(-1)**0.5',
    '1/0',
    '1%0',
    '0**-1',
    'x',
    'open(1)',
    'abs()',
    '__import__("os")',
    'x.y',
    '[1]',
    'lambda: 1',
    '(' * 500 + '1' + ')' * 500,
    '-' * 500 + '1',
    '1' * 5000,
    '+'.join('1' * 1500),
    'if',
    '1 if 2',
    '()',
    'abs(1',
    'abs(1,',
    '2**4096',
    'not',
    'not ' * 300 + '1',
    '\ud800',
    '１+１',
    '*'.join(['9' * 300] * 9),
    '1\x00',
    'abs(1, 2)',
  )
  def test_what_has_no_value_is_told_in_little_time(self, text):
    with self.assertRaises(expression.ExpressionError):
      value(text)

  def test_any_text_has_a_value_or_is_refused(self):
    rng = random.Random(1)
    alphabet = '0123456789+-*/%()<>=,. abx' + 'éß×÷\n\t"\\'
    for _ in range(3000):
      text = ''.join(rng.choices(alphabet, k=rng.randrange(30)))
      try:
        value(text, x=2)
      except expression.ExpressionError:
        continue


class ExtractTest(parameterized.TestCase):
  @parameterized.parameters(
    ('<answer>1</answer> <answer> 2 </answer>', 'answer', '2'),
    ('<answer>1', 'answer', None),
    (r'so \boxed{1} or \boxed{\frac{1}{2}}', 'boxed', r'\frac{1}{2}'),
    (r'\boxed{1} and \boxed{2', 'boxed', '1'),
    ('none', 'boxed', None),
    ('a\n b \n\n', 'line', 'b'),
    ('', 'line', None),
    (' a ', 'all', 'a'),
  )
  def test_answer(self, text, place, want):
    self.assertEqual(extract.answer(text, place), want)

  @parameterized.parameters(
    ('<think>a</think><answer>b</answer>', False, True),
    (' <think>\na\n</think>\n<answer>b</answer>\n', False, True),
    ('a</think><answer>b</answer>', True, True),
    ('<think>a</think><answer>b</answer>', True, False),
    ('<think>a</think><answer>b</answer> c', False, False),
    ('<think>a</think> c <answer>b</answer>', False, False),
    ('<answer>b</answer><think>a</think>', False, False),
    ('<think>a<think></think><answer>b</answer>', False, False),
    ('<think></think><answer>b</answer>', False, False),
    ('<think>a</think><answer> </answer>', False, False),
    ('<think>a<answer>b</answer></think>', False, False),
    ('b', False, False),
  )
  def test_form(self, text, opened, want):
    self.assertEqual(extract.is_in_form(text, opened=opened), want)


def said(text):
  return f'<think>x</think><answer>{text}</answer>'


class VerifiersTest(parameterized.TestCase):
  @parameterized.parameters(
    ('2*(3+4)', 1.0),
    ('(3+4)*2 = 14', 1.0),
    ('4*3+2', 1.0),
    ('2*7', 0.0),  # another number
    ('2*(3+4)+2-2', 0.0),  # a number too often
    ('14', 0.0),
    ('2*(3+4', 0.0),
    ('2*3+4', 0.0),  # another value
    ('-2+4*3+4', 0.0),
    ('4*3--2', 0.0),  # a minus that is no operator between two numbers
    ('23-4', 0.0),  # digits put together
    ('2*(3+4)**1', 0.0),
    ('abs(4*3+2)', 0.0),
    ('', 0.0),
  )
  def test_countdown(self, text, want):
    problem = {'numbers': [2, 3, 4], 'target': 14}
    self.assertEqual(verifiers.Countdown()(said(text), problem), want)

  def test_countdown_of_equal_numbers_uses_each(self):
    problem = {'numbers': [5, 5, 1], 'target': 25}
    countdown = verifiers.Countdown('all')
    self.assertEqual(countdown('5*5*1', problem), 1.0)
    self.assertEqual(countdown('5*5', problem), 0.0)
    self.assertEqual(countdown('5*5*5/5*1', problem), 0.0)

  def test_countdown_is_exact(self):
    problem = {'numbers': [1, 3, 3], 'target': 1}
    self.assertEqual(verifiers.Countdown('all')('1/3*3', problem), 1.0)
    problem = {'numbers': [8, 3, 8, 3], 'target': 24}  # 8/(3-8/3)
    self.assertEqual(verifiers.Countdown('all')('8/(3-8/3)', problem), 1.0)

  @parameterized.parameters(
    ('46', 1.0), ('40+6', 1.0), ('46.0', 1.0), ('92/2', 1.0), ('46.1', 0.0),
    ('forty', 0.0), ('46 47', 0.0), ('1/0', 0.0), ('-46', 0.0),
  )  # fmt: skip
  def test_arithmetic(self, text, want):
    problem = {'answer': '46'}
    self.assertEqual(verifiers.Arithmetic()(said(text), problem), want)

  def test_a_problem_without_a_sound_answer_raises(self):
    with self.assertRaises(expression.ExpressionError):
      verifiers.Arithmetic()(said('1'), {'answer': 'one'})

  @parameterized.parameters(
    ('2*x+3', 1.0),
    ('return 3+x+x', 1.0),
    ('return\n(2*x+3)', 1.0),
    ('returns', 0.0),
    ('2*x+3 if x<9 else 0', 1.0),
    ('5 if x==1 else 7', 0.0),  # what is shown alone
    ('2*x+y', 0.0),
    ('__import__("os").system("true")', 0.0),
    ('x.__class__', 0.0),
    ('1/(x-1)', 0.0),
  )
  def test_code(self, text, want):
    pairs = [[[1], 5], [[2], 7], [[-4], -5]]
    problem = {'arguments': ['x'], 'pairs': pairs}
    self.assertEqual(verifiers.Code()(said(text), problem), want)

  def test_code_of_two_arguments_and_fractions(self):
    problem = {
      'arguments': ['a', 'b'],
      'pairs': [[[1, 2], 0.5], [[3, 4], 0.75]],
    }
    self.assertEqual(verifiers.Code('all')('a/b', problem), 1.0)
    problem = {'arguments': ['a'], 'pairs': [[[1], True], [[-1], False]]}
    self.assertEqual(verifiers.Code('all')('a > 0', problem), 1.0)
    self.assertEqual(verifiers.Code('all')('a < 0', problem), 0.0)

  @parameterized.parameters(
    ('en', 'so it is', 1.0),
    ('en', 'so 因为', 1 / 3),
    ('zh', '因为 it', 2 / 3),
    ('en', 'soя', 0.0),
    ('ru', 'так и быть', 1.0),
    ('ja', 'カタカナー and', 5 / 6),
    ('en', '1 + 2 = 3', 0.0),
    ('en', '', 0.0),
    ('de', 'schöne Grüße', 1.0),
  )
  def test_language(self, target, text, want):
    found = verifiers.Language(target)(f'<think>{text}</think>因', {})
    self.assertAlmostEqual(found, want)

  def test_length(self):
    length = verifiers.Length(most=20, soft=4)
    found = [length('', {'tokens': n}) for n in (1, 16, 18, 20, 99)]
    self.assertEqual(found, [0, 0, -0.5, -1, -1])


class RewardsTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 'at least one'),
    ('countdown', 'at least one'),
    (['countdown'], r"rewards\[0\].kind = 'countdown'"),
    ([{'kind': 'rm'}], "kind = 'rm'"),
    ([{'kind': 'exact', 'weight': '1'}], "weight = '1'"),
    ([{'kind': 'exact', 'weight': float('nan')}], 'weight = nan'),
    ([{'kind': 'exact', 'plce': 'all'}], 'plce: no such field; exact has'),
    ([{'kind': 'exact', 'place': 3}], 'place = 3: must be str'),
    ([{'kind': 'exact', 'place': 'top'}], "place = 'top'"),
    ([{'kind': 'language', 'target': 'xx'}], "target = 'xx'"),
    ([{'kind': 'length', 'soft': 0}], 'soft = 0'),
  )
  def test_what_is_wrong_is_named(self, values, message):
    with self.assertRaisesRegex(InputError, f'file: .*{message}'):
      rewards.read(values, 'file')

  def test_a_problem_that_lacks_its_answer_is_named(self):
    made = rewards.read([{'kind': 'countdown'}], 'file')
    with self.assertRaisesRegex(InputError, "line 3: has no 'target'"):
      rewards.check(made, {'numbers': [1]}, 'line 3')


if __name__ == '__main__':
  absltest.main()
