"""The judge: what hangs, raises or dies costs one answer and is counted."""

import math
import os
import shutil
import tempfile
import threading
import time

from absl.testing import absltest

from deepseek_jax.errors import InputError
from deepseek_jax.rl.grading import adaptors
from deepseek_jax.rl.judge import Judge

OWN = """
import os, subprocess, sys, time
def score(text, problem):
  print('printed by a verifier')
  if text == 'hang':
    time.sleep(60)
  if text == 'loop':
    while True: pass
  if text == 'die':
    os._exit(3)
  if text == 'exit':
    sys.exit(0)
  if text == 'raise':
    raise ValueError('no\\nway')
  if text == 'nan':
    return float('nan')
  if text == 'none':
    return None
  if text == 'child':
    subprocess.Popen(['sleep', '60'])
    time.sleep(60)
  if text == 'write':
    os.write(1, b'written past Python')
    return 7.0
  if text == 'memory':
    return len(bytearray(1 << 40))
  return problem['value']
"""


class JudgeTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def judge(self, rewards, **fields):
    out = Judge(rewards, **fields)
    self.addCleanup(out.close)
    return out

  def own(self, **fields):
    path = os.path.join(self.folder, 'own.py')
    with open(path, 'w') as file:
      file.write(OWN)
    return self.judge([{'kind': 'own', 'file': path}], **fields)

  def test_each_fault_costs_one_answer_and_says_why(self):
    judge = self.own(seconds=1.5)
    texts = ('good', 'hang', 'good', 'loop', 'die', 'raise', 'nan', 'none')
    texts += ('memory', 'exit', 'good')
    found = dict(enumerate(judge([(t, {'value': 2.0}) for t in texts])))
    for n, text in enumerate(texts):
      if text == 'good':
        self.assertEqual(found[n], ((2.0,), None))
        self.assertEqual(found[n].reward, 2.0)
      else:
        self.assertIsNone(found[n].scores)
        self.assertTrue(math.isnan(found[n].reward))
    self.assertEqual((judge.errors, judge.scored), (8, 3))
    self.assertIn('took more than 1.5 s', found[1].error)
    self.assertEqual(found[5].error, 'own: ValueError: no way')
    self.assertIn('gave nan', found[6].error)
    self.assertIn('TypeError', found[7].error)
    self.assertIn('MemoryError', found[8].error)

  def test_what_a_verifier_starts_or_writes_stays_its_own(self):
    judge = self.own(seconds=1.5)
    start = time.perf_counter()
    asked = [(t, {'value': 2.0}) for t in ('child', 'write', 'good')]
    found = judge(asked)
    self.assertLess(time.perf_counter() - start, 30)
    self.assertEqual([v.scores for v in found], [None, (7.0,), (2.0,)])

  def test_a_process_that_died_between_answers_costs_none(self):
    judge = self.own()
    self.assertEqual(judge([('good', {'value': 2.0})])[0].reward, 2.0)
    judge._workers[0]._process.kill()
    judge._workers[0]._process.wait()
    self.assertEqual(judge([('good', {'value': 2.0})])[0].reward, 2.0)

  def test_any_text_is_scored(self):
    judge = self.judge([{'kind': 'exact', 'place': 'all'}])
    texts = ('\ud800', '\x00\n\r\u2028', 'é' * 3_000_000, '')
    found = judge([(t, {'answer': 'x'}) for t in texts])
    self.assertEqual([v.scores for v in found], [(0.0,)] * 4)

  def test_order_stays_over_processes_and_threads(self):
    judge = self.own(processes=3)
    asked = [('x', {'value': float(n)}) for n in range(20)]
    found = []
    thread = threading.Thread(target=lambda: found.extend(judge(asked)))
    thread.start()
    thread.join()
    self.assertEqual([v.reward for v in found], list(map(float, range(20))))

  def test_rewards_are_weighted_and_stay_apart(self):
    judge = self.judge(
      [{'kind': 'countdown'}, {'kind': 'format', 'weight': 0.5}]
    )
    text = '<think>so</think><answer>2*(3+4)</answer>'
    problem = {'numbers': [2, 3, 4], 'target': 14}
    (good, lacks) = judge([(text, problem), ('?', {'numbers': [2]})])
    self.assertEqual(good.scores, (1.0, 0.5))
    # Never a silent 0, whatever was answered.
    self.assertIn("has no 'target'", lacks.error)

  def test_the_process_is_light(self):
    judge = self.judge([{'kind': 'exact', 'place': 'all'}])
    start = time.perf_counter()
    judge([('a', {'answer': 'a'})])
    self.assertLess(time.perf_counter() - start, 20)
    path = os.path.join(self.folder, 'own.py')
    with open(path, 'w') as file:
      file.write(
        'import sys\ndef score(t, p): return float("jax" in sys.modules)\n'
      )
    (verdict,) = self.judge([{'kind': 'own', 'file': path}])([('', {})])
    self.assertEqual(verdict.scores, (0.0,))

  def test_a_file_without_the_function_is_an_error_of_each_answer(self):
    path = os.path.join(self.folder, 'own.py')
    with open(path, 'w') as file:
      file.write('x = 1\n')
    (verdict,) = self.judge([{'kind': 'own', 'file': path}])([('', {})])
    self.assertIn('has no function score', verdict.error)

  def test_what_is_no_judge_is_refused(self):
    with self.assertRaisesRegex(InputError, "kind = 'x'"):
      Judge([{'kind': 'x'}])
    with self.assertRaisesRegex(InputError, 'processes = 0'):
      Judge([{'kind': 'format'}], processes=0)


class AdaptorsTest(absltest.TestCase):
  def test_math_verify_compares_values_in_any_thread(self):
    judge = Judge([{'kind': 'math_verify'}], seconds=60.0)
    self.addCleanup(judge.close)
    asked = [
      (r'The answer is \boxed{0.5}', {'answer': r'\frac{1}{2}'}),
      (r'\boxed{0.51}', {'answer': r'\frac{1}{2}'}),
      ('no answer', {'answer': '3'}),
    ]
    found = []
    thread = threading.Thread(target=lambda: found.extend(judge(asked)))
    thread.start()
    thread.join()
    if 'not installed' in (found[0].error or ''):
      self.skipTest('math-verify is not installed')
    self.assertEqual([v.scores for v in found], [(1.0,), (0.0,), (0.0,)])

  def test_reasoning_gym_scores_its_own_problems(self):
    try:
      problems = [
        *adaptors.gym_problems('chain_sum', 2, seed=1),
        *adaptors.gym_problems('countdown', 1, seed=1),
      ]
    except InputError:
      self.skipTest('reasoning_gym is not installed')
    judge = Judge([{'kind': 'reasoning_gym'}], seconds=60.0)
    self.addCleanup(judge.close)
    right = [(f'<answer>{p["answer"]}</answer>', p) for p in problems]
    wrong = [('<answer>?</answer>', p) for p in problems]
    self.assertEqual([v.reward for v in judge(right)], [1.0] * 3)
    # countdown gives 0.01 to any answer at all.
    self.assertEqual([v.reward for v in judge(wrong)], [0.0] * 3)


if __name__ == '__main__':
  absltest.main()
