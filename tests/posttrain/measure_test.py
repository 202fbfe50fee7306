"""pass@k, intervals, and what is kept of answers."""

import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.infer.request import Answer, Usage
from deepseek_jax.posttrain import collect, measure

FORM = '<think>{}</think><answer>{}</answer>'
REWARDS = ({'kind': 'exact'}, {'kind': 'format', 'weight': 0.2})


class FakeSampler:
  """Answers what it is told to; a token is a character."""

  def __init__(self, said):
    self.said = said

  def answers(self, variables, prompts, n, seed):
    del variables, seed
    made = lambda text, finish: Answer(
      tuple(map(ord, text)), '', (), finish, None, Usage(1, 0, len(text))
    )
    return [[made(*one) for one in self.said[p][:n]] for p in prompts]

  def text(self, answer):
    return ''.join(map(chr, answer.tokens))


class SharesTest(parameterized.TestCase):
  @parameterized.parameters((5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4))
  def test_pass_at_k_counts_every_choice(self, draws, right, k):
    drawn = [n < right for n in range(draws)]
    choices = list(itertools.combinations(drawn, k))
    self.assertAlmostEqual(
      measure.share_solved(draws, right, k),
      np.mean([any(choice) for choice in choices]),
    )

  def test_more_than_were_drawn_is_refused(self):
    with self.assertRaises(ValueError):
      measure.share_solved(4, 1, 5)

  @parameterized.parameters(
    # Brown, Cai and DasGupta 2001 print Wilson's interval as this formula;
    # values by R's prop.test(correct = FALSE).
    (8, 10, 0.4901625, 0.9433178),
    (0, 20, 0.0, 0.1611252),
    (64, 64, 0.9433774, 1.0),
  )
  def test_wilson(self, right, count, low, high):
    found = measure.wilson(right, count)
    np.testing.assert_allclose(found, (low, high), atol=2e-5)


class CollectTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    right, long = FORM.format('a', '3'), FORM.format('aaaa', '3')
    self.said = {
      '1+2=': [
        (long, 'stop'),
        (right, 'stop'),
        (FORM.format('', '4'), 'stop'),
        ('<answer>3</answer>', 'stop'),  # right, and not in the form
      ],
      '1+1=': [
        (FORM.format('a', '3'), 'stop'),
        (FORM.format('b', '2'), 'length'),  # right, and has no end
        (FORM.format('c', '1'), 'stop'),
        ('', 'stop'),
      ],
    }
    self.problems = [
      {'prompt': '1+2=', 'answer': '3', 'task': 'addition', 'level': 1},
      {'prompt': '1+1=', 'answer': '2', 'task': 'addition', 'level': 1},
    ]

  def collect(self, **changes):
    path = self.folder / 'kept.jsonl'
    counts = collect.collect(
      path, FakeSampler(self.said), {}, self.problems, REWARDS,
      drawn=4, seed=0, **changes,
    )  # fmt: skip
    return counts, [json.loads(row) for row in path.read_text().splitlines()]

  def test_the_shortest_right_answer_is_kept(self):
    counts, rows = self.collect()
    self.assertEqual(
      rows, [{'prompt': '1+2=', 'completion': FORM.format('a', '3')}]
    )
    self.assertEqual((counts['drawn'], counts['right']), (8, 4))
    self.assertEqual((counts['asked'], counts['kept']), (2, 1))

  def test_the_control_keeps_what_is_wrong(self):
    self.said['1+2='] = [(FORM.format('x', '9'), 'stop')] * 4
    self.said['1+1='] = [(FORM.format('y', '8'), 'stop')] * 4
    counts, rows = self.collect(verify=False)
    self.assertEqual((counts['right'], counts['kept']), (0, 2))
    self.assertIn('>9<', rows[0]['completion'])

  def test_nothing_right_is_said(self):
    for prompt in self.said:
      self.said[prompt] = [(FORM.format('a', '9'), 'stop')] * 4
    counts, rows = self.collect()
    self.assertEqual((counts['kept'], rows), (0, []))
    with self.assertRaisesRegex(InputError, 'kept: none of 8 answers to 2'):
      collect.check_some(counts, 'kept')

  def test_what_is_measured(self):
    found = measure.measured(
      FakeSampler(self.said), {}, self.problems, REWARDS, draws=4, seed=0
    )
    kind = found['kinds']['addition 1']
    self.assertEqual((found['greedy'], kind['problems']), (0.5, 2))
    # Three of four and one of four draws are right.
    self.assertAlmostEqual(found['pass']['1'], (3 / 4 + 1 / 4) / 2)
    self.assertAlmostEqual(found['pass']['4'], 1.0)
    self.assertNotIn('8', found['pass'])
    self.assertAlmostEqual(found['truncated'], 1 / 8)
    self.assertEqual([s['right'] for s in found['samples']], [True, False])
    json.dumps(found, allow_nan=False)


if __name__ == '__main__':
  absltest.main()
