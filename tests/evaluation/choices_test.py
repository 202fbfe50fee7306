"""Multiple choice against log-probs in float64 NumPy; wrong questions."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.evaluation import choices
from tests.rl import taught

ROWS = [
  {'question': '3+3=', 'choices': ['6', 'six', '42'], 'answer': 0},
  {'question': 'sort 21:', 'choices': ['12', '21'], 'answer': '12'},
  {'question': '', 'choices': ['a', 'ab', 'é'], 'answer': 2},
  {'question': 'x' * 60, 'choices': ['y' * 9, 'z'], 'answer': 1},
]


def by_hand(question, choice, between):
  """Returns the log-likelihood of a choice from the logits in float64."""
  source = taught.opened()
  tokens = source.tokenizer.encode(f'{question}{between}{choice}')
  before = len(source.tokenizer.encode(question))
  ids = [source.tokenizer.eos_id, *tokens]
  out = jax.jit(source.model.apply)(source.variables, np.array([ids], np.int32))
  logits = np.float64(out.logits[0])
  top = logits.max(-1, keepdims=True)
  table = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
  return sum(table[i - 1, ids[i]] for i in range(1 + before, len(ids)))


class ChoicesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def file(self, *rows):
    path = os.path.join(self.folder, 'quiz.jsonl')
    Path(path).write_text('\n'.join(map(json.dumps, rows)))
    return path

  def test_it_is_what_the_log_probs_make_by_hand(self):
    questions = choices.read(self.file(*ROWS))
    path = Path(self.folder, 'rows.jsonl')
    found = choices.chosen(taught.asked(), questions, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    right, by_bytes = [], []
    for row, question in zip(rows, questions):
      want = [by_hand(question.text, c, ' ') for c in question.choices]
      np.testing.assert_allclose(row['log_likelihoods'], want, rtol=1e-5)
      right.append(np.argmax(want) == question.answer)
      sizes = [len(c.encode()) for c in question.choices]
      by_bytes.append(np.argmax(np.divide(want, sizes)) == question.answer)
    self.assertEqual(found['accuracy']['value'], np.mean(right))
    self.assertEqual(found['accuracy_by_bytes']['value'], np.mean(by_bytes))
    self.assertAlmostEqual(
      found['chance'], np.mean([1 / 3, 1 / 2, 1 / 3, 1 / 2])
    )
    self.assertEqual([q.answer for q in questions], [0, 0, 2, 1])
    # Again, from what is written and from nothing: the same numbers.
    self.assertEqual(choices.chosen(taught.asked(), questions, path), found)
    other = Path(self.folder, 'other.jsonl')
    self.assertEqual(choices.chosen(taught.asked(), questions, other), found)

  def test_by_bytes_is_not_by_sum(self):
    # A long choice loses by its sum and may win by its mean.
    made = choices._question(
      {'question': 'a', 'choices': ['bbbb', 'c'], 'answer': 0}, 'here'
    )
    run = lambda variables, batch: (
      -batch['scored'][:, 1:]
      / (1 + (batch['scored'].sum(1, keepdims=True) > 2))
    )
    [row] = choices._scored(run, taught.asked(), [made], '')
    self.assertEqual(row['log_likelihoods'], [-2.0, -1.0])
    self.assertEqual((row['chosen'], row['chosen_by_bytes']), (1, 0))

  def test_scores_that_are_no_numbers_are_named(self):
    made = choices.Question('a', ('b', 'c'), 0, 'quiz.jsonl line 3')
    run = lambda variables, batch: batch['scored'][:, 1:] * np.nan
    message = r'^quiz.jsonl line 3: the log-likelihoods are \[nan, nan\]'
    with self.assertRaisesRegex(ds.InputError, message):
      choices._scored(run, taught.asked(), [made], '')

  def test_tokens_that_join_question_and_choice_are_scored(self):
    class Joining:
      eos_id = 0

      def encode(self, text):  # 'bc' is one token
        return [ord(c) for c in text.replace('bc', '\x01')]

    asked = taught.asked()._replace(tokenizer=Joining())
    question = choices.Question('ab', ('c', 'd'), 0, 'here')
    first, second = choices.rows_of(asked, question, '')
    self.assertEqual(first, ([0, ord('a'), 1], 2))
    # Both behind 'a' alone: P(b) is part of the second, as it is of the first.
    self.assertEqual(second, ([0, ord('a'), ord('b'), ord('d')], 2))
    alike = choices.Question('a', ('b', 'bd'), 0, 'here')
    for row in choices.rows_of(asked, alike, ''):
      self.assertEqual(row.start, 2)

  @parameterized.parameters(
    ('nonsense', 'is not JSON'),
    ('[1]', 'must be an object with question'),
    ({'choices': ['a', 'b'], 'answer': 0}, "'question' is missing"),
    ({'question': 'q', 'choices': ['a', 'b']}, "'answer' is missing"),
    ({'question': 1, 'choices': ['a', 'b'], 'answer': 0}, 'question = 1'),
    ({'question': 'q', 'choices': ['a'], 'answer': 0}, 'at least two'),
    ({'question': 'q', 'choices': ['a', ''], 'answer': 0}, r'choices\[1\] = '),
    ({'question': 'q', 'choices': ['a', 'a'], 'answer': 0}, 'stands twice'),
    ({'question': 'q', 'choices': ['a', 'b'], 'answer': 2}, 'answer = 2'),
    ({'question': 'q', 'choices': ['a', 'b'], 'answer': -1}, 'answer = -1'),
    ({'question': 'q', 'choices': ['a', 'b'], 'answer': True}, 'answer = True'),
    ({'question': 'q', 'choices': ['a', 'b'], 'answer': 'c'}, "answer = 'c'"),
    ({'question': '\ud800', 'choices': ['a', 'b'], 'answer': 0}, 'Unicode'),
  )
  def test_a_line_at_fault_is_named(self, row, message):
    path = self.file(ROWS[0])
    text = row if isinstance(row, str) else json.dumps(row)
    Path(path).write_text(f'{json.dumps(ROWS[0])}\n\n{text}\n')
    with self.assertRaisesRegex(ds.InputError, f'line 3: .*{message}'):
      choices.read(path)

  def test_an_empty_file_is_named(self):
    with self.assertRaisesRegex(ds.InputError, 'holds no question'):
      choices.read(self.file())
    with self.assertRaisesRegex(ds.InputError, 'cannot be read'):
      choices.read('/nowhere.jsonl')


if __name__ == '__main__':
  absltest.main()
