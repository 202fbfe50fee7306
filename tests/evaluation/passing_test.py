"""pass@k on a task: by hand, deterministic, gone on with, errors counted."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.evaluation import passing
from deepseek_jax.rl import answering
from tests.rl import taught


class PassingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def passed(self, name='a.jsonl', ks=(1, 2, 3), task=None, **changes):
    path = Path(self.folder, name)
    more = {n: changes.pop(n) for n in ('limit', 'about') if n in changes}
    cfg = taught.sampled(**changes)
    task = task or taught.read()
    return path, passing.passed(taught.asked(), task, cfg, ks, path, **more)

  def test_it_is_what_the_answers_make_by_hand(self):
    path, found = self.passed()
    task = taught.read()
    self.assertEqual(found['problems'], len(task.heldout))
    with answering.Answering(
      taught.asked(), task, task.heldout, taught.sampled()
    ) as answers:
      # One by one, from the last to the first: nothing else may matter.
      groups = [
        dict(answers.each(place, place + 1))[place]
        for place in reversed(range(len(task.heldout)))
      ][::-1]
    right = [[a.text.isdigit() for a in group] for group in groups]
    self.assertTrue(any(0 < sum(r) < 3 for r in right))  # else it says little
    np.testing.assert_allclose(
      found['pass']['1']['value'], np.mean([np.mean(r) for r in right])
    )
    np.testing.assert_allclose(
      found['pass']['3']['value'], np.mean([any(r) for r in right])
    )
    pairs = [
      np.mean([any((r[0], r[1])), any((r[0], r[2])), any((r[1], r[2]))])
      for r in right
    ]
    np.testing.assert_allclose(found['pass']['2']['value'], np.mean(pairs))
    np.testing.assert_allclose(found['reward'], np.mean(right))
    lengths = [len(a.tokens) for group in groups for a in group]
    self.assertEqual(found['answer_tokens'], np.mean(lengths))
    unfinished = [not a.whole for group in groups for a in group]
    self.assertEqual(found['unfinished'], np.mean(unfinished))
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    self.assertEqual(
      [row['texts'] for row in rows], [[a.text for a in g] for g in groups]
    )
    low, high = found['pass']['1']['interval']
    self.assertLessEqual(low, found['pass']['1']['value'])
    self.assertGreaterEqual(high, found['pass']['1']['value'])
    # Cut after some problems, it goes on to the same.
    lines = path.read_bytes().splitlines(keepends=True)
    Path(self.folder, 'b.jsonl').write_bytes(b''.join(lines[:4]))
    again, other = self.passed('b.jsonl')
    self.assertEqual(other, found)
    self.assertEqual(again.read_bytes(), path.read_bytes())
    # A limit takes the first.
    _, few = self.passed('c.jsonl', limit=2)
    self.assertEqual(few['problems'], 2)
    np.testing.assert_allclose(
      few['pass']['1']['value'], np.mean([np.mean(r) for r in right[:2]])
    )

  def test_neighbouring_seeds_share_no_answer_by_their_draws(self):
    drawn = []
    for seed in (0, 1):
      path, _ = self.passed(f'{seed}.jsonl', ks=(1,), n=6, seed=seed)
      rows = path.read_text().splitlines()[1:]
      drawn.append([json.loads(row)['texts'] for row in rows])
    same = [a[1:] == b[:-1] for a, b in zip(*drawn)]
    self.assertLess(sum(same), len(same) // 2)

  def test_a_failing_verifier_leaves_its_answers_out(self):
    own = os.path.join(self.folder, 'own.py')
    path = taught.task(self.folder, rewards=[{'kind': 'own', 'file': own}])
    Path(own).write_text(
      'def score(text, problem):\n'
      '  if len(text) == 1: raise ValueError("no")\n'
      '  return 1.0\n'
    )
    task = taught.tasks.read(path)
    path, found = self.passed(task=task, ks=(1,))
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    ones = sum(len(t) == 1 for row in rows for t in row['texts'])
    self.assertGreater(ones, 0)
    self.assertEqual(found['verifier_errors'], ones)
    self.assertEqual(found['pass']['1']['value'], 1.0)  # of those with a score
    some = sum(row['scored'] >= 1 for row in rows)
    self.assertEqual(found['pass']['1']['problems'], some)
    Path(own).write_text('def score(text, problem): raise ValueError("no")\n')
    with self.assertRaisesRegex(
      ds.InputError, 'pass@1: no problem has so many'
    ):
      self.passed('b.jsonl', task=task, ks=(1,))

  def test_scores_of_other_code_are_not_gone_on_with(self):
    own = os.path.join(self.folder, 'own.py')
    path = taught.task(self.folder, rewards=[{'kind': 'own', 'file': own}])
    for score in (0.0, 1.0):
      Path(own).write_text(f'def score(text, problem): return {score}\n')
      _, found = self.passed(f'{score}', (1,), taught.tasks.read(path), n=1)
      self.assertEqual(found['reward'], score)
    with self.assertRaisesRegex(ds.InputError, 'verifiers is'):
      self.passed('0.0', (1,), taught.tasks.read(path), n=1)

  def test_what_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'k = 4: must lie in 1..n = 3'):
      self.passed(ks=(1, 4))
    task = taught.tasks.read(taught.task(self.folder, heldout=0))
    with self.assertRaisesRegex(ds.InputError, 'task: holds no problem out'):
      self.passed(task=task)
    with self.assertRaisesRegex(ds.InputError, 'n = 3: at .*temperature = 0'):
      taught.sampled(temperature=0)
    self.passed(ks=(1,), limit=1)
    with self.assertRaisesRegex(ds.InputError, "model is missing there, 'b'"):
      self.passed(ks=(1,), limit=1, about={'model': 'b'})

  def test_a_chat_without_ends_is_refused(self):
    asked = taught.asked()
    endless = asked._replace(chat=EndlessChat(asked.tokenizer))
    with self.assertRaisesRegex(ds.InputError, 'chat: has no token that ends'):
      answering.Answering(
        endless, taught.read(), taught.read().train, taught.sampled()
      )


class EndlessChat:
  ends = ()

  def __init__(self, tokenizer):
    self.prompt = tokenizer.encode


if __name__ == '__main__':
  absltest.main()
