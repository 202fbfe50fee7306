"""Rounds of rollouts: mini-batches, the old policy, the reference, redraws."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.rl import rollout, scoring
from deepseek_jax.rl.advantages import advantages
from deepseek_jax.rl.rollout import Rollout
from deepseek_jax.run import folder as folders
from deepseek_jax.run import replay, rl, sources
from tests import tokenizer_folders
from tests.rl.sft_run_test import TINY
from tests.run.rl_run_test import config, task

SEVERAL = {
  'rollouts.updates': 2,
  'rollouts.epochs': 2,
  'train.batch.size': 8,
  'train.tokens': 8 * 16 * 12.0,
  'objective.reference_every': 4,
  'evaluate.every': 0,
  'checkpoint_every': 1,
  'keep': 99,
}


class FakeAnswerer:
  """Answers with the prompt's place, and rewards by a function of it."""

  drafted = (0, 0)

  def __init__(self, reward, errors=0):
    self.reward, self.errors, self.asked, self.number = reward, errors, [], 0

  def groups(self, variables, problems, seed, first):
    self.asked.append((len(problems), seed, first))
    out = []
    for _ in problems:
      out.append(
        [Rollout((5, 6), (7 + n, 1), (-1.0, -1.0), True) for n in range(8)]
      )
    return out

  def rewards(self, groups, problems):
    found = []
    for _ in groups:
      found.append([self.reward(self.number, n) for n in range(8)])
      self.number += 1
    return np.array(found, float), self.errors


class RoundTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)
    task(self.folder)

  def stream(self, **changes):
    """Batches of a run; `see` must be called before `next`."""
    made = config(self.folder, **changes)
    store = sources.opened(made, lambda line: None)
    return sources.batches(store, made), made

  def faked(self, reward, errors=0, **changes):
    out, made = self.stream(**{'rollouts.compare_every': 0, **changes})
    out._answerer = FakeAnswerer(reward, errors)
    out._said = []
    out._tell = out._said.append
    out.see(dict)
    return out, made

  def weights(self, seed):
    return ds.build(TINY).init(jax.random.key(seed))

  def test_the_old_policy_is_that_of_the_rounds_beginning(self):
    out, made = self.stream(**SEVERAL)
    first, second = self.weights(0), self.weights(1)
    score = scoring.scorer(ds.build(TINY), made.objective)
    seen = []
    for number in range(4):
      # Weights move between the updates of a round.
      out.see(lambda n=number: first if n == 0 else second)
      seen.append(out.next(8))
      self.assertEqual('reward' in out.told, number == 0)
    for batch in seen:
      self.assertIn('old', batch)
      np.testing.assert_array_equal(batch['old'], score(first, batch))
      # Of one program and equal weights, the sampler is the trainer.
      on = batch['trained'] > 0
      gap = np.abs(batch['old'] - batch['sampler'])[on]
      self.assertLess(gap.max(), 1e-5)
    for a, b in zip(seen[:2], seen[2:]):  # two epochs of two mini-batches
      for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    trained = [int((b['trained'] > 0).sum()) for b in seen[:2]]
    self.assertEqual(sum(trained), 32)  # 4 prompts, 8 answers of one token
    self.assertEqual(trained, [16, 16])

  @parameterized.parameters((0, 0), (4, 1))
  def test_the_reference_is_refreshed_every_so_many_updates(self, every, which):
    changes = {**SEVERAL, 'objective.reference_every': every}
    out, made = self.stream(**changes)
    held = [self.weights(seed) for seed in range(2)]
    score = scoring.scorer(ds.build(TINY), made.objective)
    for number in range(8):
      out.see(lambda n=number: held[n // 4])
      batch = out.next(8)
      want = score(held[0 if number < 4 else which], batch)
      np.testing.assert_array_equal(batch['reference'], want)
    kept = out.held()['reference']
    for a, b in zip(*map(jax.tree.leaves, (kept, held[which]))):
      np.testing.assert_array_equal(a, b)

  def test_groups_with_equal_rewards_are_drawn_again(self):
    # Of every three prompts one has rewards that differ.
    reward = lambda place, n: float(place % 3 == 0 and n == 0)
    dynamic = {'objective.kl': 'none', 'objective.kl_weight': 0.0}
    dynamic |= {'objective.dynamic_sampling': True, 'train.batch.size': 32}
    out, _ = self.faked(reward, **dynamic, **{'rollouts.redraws': 9})
    batch = out.next(32)
    asked = out._answerer.asked
    # Groups 0 and 3 of the first four; then two are lacking, and so on.
    self.assertEqual(
      [(n, first) for n, _, first in asked][:2], [(4, 0), (2, 4)]
    )
    self.assertLen({seed for _, seed, _ in asked}, 1)
    drawn = sum(n for n, *_ in asked)
    self.assertEqual(drawn, 10)  # the fourth is number 9
    self.assertEqual(out.get_state()['next_prompt'], drawn)
    self.assertAlmostEqual(out.told['redrawn'], 1 - 4 / drawn)
    self.assertAlmostEqual(out.told['equal_groups'], 6 / drawn)
    self.assertEqual((batch['trained'] > 0).sum(), 4 * 8 * 2)
    # A run that goes on asks the prompts that come next.
    again, _ = self.faked(reward, **dynamic)
    again.set_state(json.loads(json.dumps(out.get_state())))
    self.assertEqual(again.get_state(), out.get_state())

  def test_redraws_have_a_bound(self):
    changes = {'objective.dynamic_sampling': True, 'rollouts.redraws': 2}
    changes |= {'objective.kl': 'none', 'objective.kl_weight': 0.0}
    out, _ = self.faked(lambda place, n: 1.0, **changes)
    batch = out.next(16)
    self.assertLen(out._answerer.asked, 3)
    self.assertEqual(out.told['equal_groups'], 1.0)
    self.assertEqual((batch['trained'] > 0).sum(), 0)

  def test_equal_rewards_for_many_rounds_are_said_with_their_share(self):
    changes = {'objective.kl': 'none', 'objective.kl_weight': 0.0}
    changes |= {'rollouts.patience': 3, 'train.batch.size': 32}
    reward = lambda place, n: float(n == 0 and place // 4 == 7)
    out, _ = self.faked(reward, **changes)
    for _ in range(12):
      out.next(32)
    # Rounds 1-7 are equal, 8 is not, 9-12 are.
    self.assertLen(out._said, 3)
    self.assertIn('for 3 rounds in a row', out._said[0])
    self.assertIn('100% of the groups, mean reward 0', out._said[0])
    self.assertIn('for 6 rounds', out._said[1])
    self.assertIn('for 3 rounds', out._said[2])

  def test_answers_without_rewards_are_dropped_and_counted(self):
    wrong = {1: np.nan, 2: np.inf, 3: -np.inf}
    reward = lambda place, n: wrong.get(n, float(n == 0))
    changes = {'objective.kl': 'none', 'objective.kl_weight': 0.0}
    out, _ = self.faked(reward, 4, **changes)
    batch = out.next(16)
    self.assertAlmostEqual(out.told['unscored'], 3 / 8)
    self.assertEqual(out.told['verifier_errors'], 4)
    self.assertAlmostEqual(out.told['reward'], 1 / 5)
    self.assertEqual((batch['trained'] > 0).sum(), 4 * 5 * 2)
    self.assertTrue(np.isfinite(batch['advantages']).all())

  def test_a_task_that_no_verifier_can_score_ends_the_run(self):
    out, _ = self.faked(lambda place, n: np.nan)
    with self.assertRaisesRegex(ds.InputError, 'no answer has a score'):
      out.next(16)

  def test_a_verifier_that_raises_is_a_metric_and_a_line(self):
    Path(self.folder, 'own.py').write_text(
      'def score(text, problem):\n'
      '  if text == "b": raise ValueError("no way")\n'
      '  return 1.0\n'
    )
    out, _ = self.stream()
    said = []
    out._answerer._say = said.append
    end = ByteTokenizer().eos_id
    group = [
      Rollout((5,), (*ByteTokenizer().encode(t), end), (0.0, 0.0), True)
      for t in 'abab'
    ]
    problem = {'prompt': 'x'}
    for _ in range(2):
      found, errors = out._answerer.rewards([group], [problem])
      self.assertEqual(errors, 2)
      np.testing.assert_array_equal(found, [[1, np.nan, 1, np.nan]])
    self.assertLen(said, 1)
    self.assertIn('2 of 4 answers have none, the first as own: Value', said[0])

  def test_rewards_are_added_up_or_come_one_by_one(self):
    own = os.path.join(self.folder, 'own.py')
    rewards = [
      {'kind': 'own', 'file': own},
      {'kind': 'length', 'most': 4, 'soft': 4, 'weight': 0.5},
    ]
    task(self.folder, rewards=rewards)
    end = ByteTokenizer().eos_id
    group = [
      Rollout((5,), (*ByteTokenizer().encode(t), end), (0.0, 0.0), True)
      for t in ('A', 'b', 'AA', 'bb')
    ]
    found = {}
    for several in ('sum', 'each'):
      changes = {'objective.advantage.several': several}
      out, made = self.stream(**changes)
      found[several], _ = out._answerer.rewards([group], [{'prompt': 'x'}])
      lesson = rollout.lesson([group], found[several], made.objective)
      want = advantages(found[several], made.objective.advantage).values
      got = [s['advantages'][0] for s in lesson.sequences]
      np.testing.assert_allclose(got, want[0], rtol=1e-6)
      self.assertAlmostEqual(
        lesson.statistics['reward'], found['sum'].mean(), places=6
      )
    self.assertEqual(found['sum'].shape, (1, 4))
    self.assertEqual(found['each'].shape, (1, 4, 2))
    np.testing.assert_allclose(found['each'].sum(axis=-1), found['sum'])
    np.testing.assert_array_equal(found['each'][0, :, 0], [1, 0, 1, 0])
    self.assertGreater(np.ptp(found['each'][0, :, 1]), 0)

  def test_without_heldout_problems_nothing_is_said_of_them(self):
    task(self.folder, heldout=0)
    out, _ = self.faked(lambda place, n: 1.0)
    self.assertEqual(out.answered({}), {})

  def test_the_middle_of_a_round_needs_the_round(self):
    out, _ = self.faked(lambda place, n: float(n), **SEVERAL)
    out.set_state({**out.get_state(), 'next_index': 5})
    with self.assertRaisesRegex(ds.InputError, 'the middle of a round'):
      out.next(8)
    with self.assertRaisesRegex(ds.InputError, "next_prompt='x'"):
      out.set_state({**out.get_state(), 'next_prompt': 'x'})


@pytest.mark.slow
class ResumedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)
    task(self.folder)

  def test_a_run_killed_within_a_round_goes_on_to_the_same_weights(self):
    made = config(self.folder, **SEVERAL)
    first = os.path.join(self.folder, 'a')
    whole = ds.fit(made, first, console=False)
    metrics = Path(first, 'metrics.jsonl').read_bytes()
    for one in replay.replay(Path(first), 4):  # within the first round
      self.assertTrue(one.same)
    for step in (6, 8):  # within a round, and before one with a new reference
      other = os.path.join(self.folder, str(step))
      shutil.copytree(first, other)
      saved = Path(other, 'checkpoints')
      for path in saved.iterdir():
        if int(path.name) > step + 1:
          shutil.rmtree(path)
      # The last step's arrays of rollouts are cut off.
      held = saved / str(step + 1) / 'held'
      files = [p for p in held.rglob('*') if p.is_file()]
      large = max(files, key=lambda p: p.stat().st_size)
      large.write_bytes(large.read_bytes()[:-7])
      said = []
      with mock.patch.object(ds.say, 'warn', said.append):
        again = ds.fit(made, other, console=False)
      self.assertIn(f'checkpoint {step + 1} is rejected', said[0])
      self.assertLen(said, 1)
      leaves = (jax.tree.leaves(r.variables) for r in (whole, again))
      for a, b in zip(*leaves):
        np.testing.assert_array_equal(a, b)
      self.assertEqual(Path(other, 'metrics.jsonl').read_bytes(), metrics)
      aside = Path(other, 'checkpoints-rejected', str(step + 1))
      self.assertTrue(aside.exists())


@pytest.mark.slow
class DraftedTest(parameterized.TestCase):
  @parameterized.parameters(
    ({},),
    (
      {
        'objective.keep_routing': True,
        'objective.keep_sampling_mask': True,
        'objective.mtp': 'trained',
        'rollouts.top_p': 0.95,
      },
    ),
  )
  def test_rollouts_with_drafts_are_the_models_own(self, changes):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    task(folder)
    model = ds.changed(
      TINY,
      {
        'layout': ((('dense', 'moe'), 1),),
        'mtp.depth': 1,
        'moe.experts': 4,
        'moe.width': 8,
        'moe.top_k': 2,
        'moe.router.groups': 1,
        'moe.router.top_groups': 1,
      },
    )
    made = config(
      folder,
      **{
        'model': model,
        'rollouts.drafts': 1,
        'rollouts.most': 6,
        'rollouts.compare_every': 1,
        'train.tokens': 16 * 32 * 2.0,
        'train.batch.size': 32,
        'evaluate.every': 0,
        **changes,
      },
    )
    workdir = os.path.join(folder, 'run')
    ds.fit(made, workdir, console=False)
    told = [r for r in ds.read_metrics(workdir) if 'acceptance' in r]
    self.assertLen(told, 2)
    for row in told:
      self.assertBetween(row['acceptance'], 0.01, 1.0)
      self.assertLess(row['mismatch_most'], 1e-5)


class BadInputTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)
    task(self.folder)

  @parameterized.parameters(
    ({'rollouts.updates': 33}, 'rollouts.updates = 33: a round has only 32'),
    (
      {'rollouts.updates': 3, 'objective.reference_every': 4},
      'objective.reference_every = 4: must be a multiple of .* = 3',
    ),
    (
      {
        'objective.router_bias': 'updated',
        'train.bias_rate': ds.SwitchConfig(0.0, 0.0, 0.5),
      },
      "objective.router_bias = 'updated': train.bias_rate is 0",
    ),
    ({'rollouts.top_p': 0.9}, 'rollouts.top_p = 0.9: objective.keep_sampling'),
    ({'rollouts.top_k': 5}, 'rollouts.top_k = 5: objective.keep_sampling'),
    ({'rollouts.drafts': 1}, 'rollouts.drafts = 1: model.mtp.depth = 0'),
    ({'objective.keep_routing': True}, 'keep_routing = True: the model has no'),
    ({'mesh.context': 2}, 'mesh.context = 2: answers are sampled a token'),
    ({'mesh.stage': 2}, 'mesh.stage = 2: answers are sampled a token'),
    (
      {'mesh.data': 8, 'rollouts.slots': 4},
      'rollouts.slots = 4: must be a multiple of the 8 shards',
    ),
    (
      {
        'rollouts.updates': 2,
        'train.batch.start': 4,
        'train.batch.ramp_tokens': 9.0,
      },
      'train.batch.size = 16: begins with 4, but rollouts.updates = 2',
    ),
    (
      {'rollouts.reference': 'x', 'objective.reference_every': 4},
      "rollouts.reference = 'x': needs an objective with a kl",
    ),
  )
  def test_what_does_not_fit_is_refused(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      config(self.folder, **changes)

  def reference(self, **changes):
    """A run's folder without weights."""
    path = Path(self.folder, 'reference')
    (path / 'checkpoints' / '1').mkdir(parents=True)
    folders.renew(path, config(self.folder, **changes))
    ByteTokenizer().save(str(path))
    return path

  @parameterized.parameters(
    ({'model.vocab_size': 300}, 'its vocabulary is another .300 tokens there'),
    ({'model.dim': 32}, 'is .* there and .* here; name a run of the same mod'),
  )
  def test_a_reference_of_another_model_is_refused(self, changes, message):
    path = self.reference(**changes)
    made = config(self.folder, **{'rollouts.reference': str(path)})
    workdir = Path(self.folder, 'run')
    with self.assertRaisesRegex(ds.InputError, message):
      ds.fit(made, workdir, console=False)
    self.assertFalse((workdir / 'config.json').exists())

  def test_a_reference_of_another_tokenizer_is_refused(self):
    path = self.reference()
    tokenizer_folders.save(str(path), tokenizer_folders.byte_level())
    folders.renew(path, config(self.folder))
    made = config(self.folder, **{'rollouts.reference': str(path)})
    with self.assertRaisesRegex(ds.InputError, 'its vocabulary is another'):
      ds.fit(made, Path(self.folder, 'run'), console=False)

  def test_a_reference_that_is_no_run_is_refused(self):
    path = self.reference()
    shutil.rmtree(path / 'checkpoints')
    for source, message in (
      (self.folder, 'holds no run'),
      (str(path), 'has saved no checkpoint; name one that has'),
    ):
      made = config(self.folder, **{'rollouts.reference': source})
      wrong = self.assertRaisesRegex(
        ds.InputError, f'rollouts.reference = .*{message}'
      )
      # It is said before the text is read.
      with mock.patch.object(sources, 'opened') as read, wrong:
        ds.fit(made, Path(self.folder, 'run'), console=False)
      read.assert_not_called()

  def test_a_template_without_a_stop_token_is_refused(self):
    text = tokenizer_folders.TEMPLATE.replace('{{ eos_token }}', '')
    for template, message in (
      (tokenizer_folders.TEMPLATE, ''),
      (text, 'none of those that end a turn'),
    ):
      folder = tempfile.mkdtemp(dir=self.folder)
      model = tokenizer_folders.byte_level()
      names = {'chat_template': template}
      tokenizer_folders.save(folder, model, names=names)
      made = config(
        self.folder,
        **{
          'data.tokenizer': folder,
          'data.vocab_size': model.get_vocab_size(),
          'model.vocab_size': model.get_vocab_size(),
          'data.seq_len': 64,
          'chat': ds.ChatConfig('template', folder),
        },
      )
      if not message:
        rl.opened(made)
        continue
      with self.assertRaisesRegex(ds.InputError, message):
        rl.opened(made)


if __name__ == '__main__':
  absltest.main()
