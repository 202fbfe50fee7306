"""Rollouts: the engine is the trainer; what is masked, dropped and counted."""

import dataclasses
import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.rl import grpo, rollout, scoring
from deepseek_jax.rl.advantages import LengthPenaltyConfig
from deepseek_jax.train import step as train
from tests import tiny

CFG = rollout.RolloutConfig(group=4, most=6)
STOP = (3,)
PROMPTS = ((5, 9, 11), (7, 20), (5, 9, 11, 13, 2))


@functools.cache
def engine():
  cfg = EngineConfig(
    slots=4, context=32, page=8, budget=16, steps=3, contexts=(32,)
  )
  return Engine(tiny.model('step'), tiny.variables('step'), cfg)


@functools.cache
def sampled():
  return rollout.sample(engine(), PROMPTS, CFG, stop=STOP, seed=1)


def made(lengths, whole=True):
  """Returns a group of answers so long."""
  return [
    rollout.Rollout((1, 2), tuple(range(4, 4 + n)), (-1.0,) * n, whole)
    for n in lengths
  ]


class SampleTest(absltest.TestCase):
  def test_the_engine_is_the_trainer(self):
    rng = np.random.default_rng(0)
    cfg = grpo.GRPOConfig()
    lesson = rollout.lesson(sampled(), rng.random((3, 4)), cfg)
    batch = rollout.batch(lesson, 16, 2)
    score = scoring.scorer(tiny.model('step'), cfg)
    batch['old'] = np.asarray(score(tiny.variables('step'), batch))
    gap = scoring.mismatch(batch)
    self.assertLess(gap['mismatch_most'], 1e-5)
    on = batch['trained'] > 0
    self.assertTrue((batch['old'][on] < 0).all())
    self.assertTrue((batch['old'][~on] == 0).all())
    self.assertEqual(on.sum(), sum(len(r.tokens) for g in sampled() for r in g))

  def test_a_seed_decides_and_answers_differ(self):
    again = rollout.sample(engine(), PROMPTS, CFG, stop=STOP, seed=1)
    self.assertEqual(again, sampled())
    other = rollout.sample(engine(), PROMPTS, CFG, stop=STOP, seed=99)
    self.assertNotEqual(other, sampled())
    for group in sampled():
      self.assertGreater(len({r.tokens for r in group}), 1)

  def test_the_end_token_is_of_the_answer(self):
    for group in sampled():
      for one in group:
        self.assertEqual(one.whole, one.tokens[-1] in STOP)
        self.assertLessEqual(len(one.tokens), CFG.most)
        self.assertLen(one.sampled, len(one.tokens))

  def test_distributions_that_differ_are_refused(self):
    warm = dataclasses.replace(CFG, temperature=0.7)
    with self.assertRaisesRegex(ds.InputError, 'rollouts.temperature = 0.7'):
      rollout.check(warm, grpo.GRPOConfig())
    rollout.check(warm, grpo.GRPOConfig(temperature=0.7))
    nucleus = dataclasses.replace(CFG, top_p=0.9)
    with self.assertRaisesRegex(ds.InputError, 'rollouts.top_p = 0.9'):
      rollout.check(nucleus, grpo.GRPOConfig())
    rollout.check(nucleus, grpo.GRPOConfig(keep_sampling_mask=True))


def scored(temperature=1.0, weights=None, top_p=1.0, **fields):
  """A batch of sampled answers with 'old', and the objective."""
  cfg = grpo.GRPOConfig(temperature=temperature, **fields)
  how = dataclasses.replace(CFG, temperature=temperature, top_p=top_p)
  groups = rollout.sample(
    recording(), PROMPTS, how, stop=STOP, seed=1, objective=cfg
  )
  lesson = rollout.lesson(groups, np.random.default_rng(0).random((3, 4)), cfg)
  batch = rollout.batch(lesson, 16, 2)
  score = scoring.scorer(tiny.model('step'), cfg)
  batch['old'] = np.asarray(score(weights or tiny.variables('step'), batch))
  return batch, cfg


@functools.cache
def recording():
  cfg = EngineConfig(
    slots=4,
    context=32,
    page=8,
    budget=16,
    steps=3,
    contexts=(32,),
    routing=True,
    kept=True,
  )
  return Engine(tiny.model('step'), tiny.variables('step'), cfg)


@functools.cache
def moved():
  """Weights after a large step: many tokens find other experts."""
  rng = np.random.default_rng(3)
  made = tiny.variables('step')
  shift = lambda a: (
    a + np.float32(0.2) * rng.normal(size=a.shape).astype(np.float32)
  )
  return {**made, 'params': jax.tree.map(shift, made['params'])}


class RecordedTest(parameterized.TestCase):
  def test_logits_are_tempered_alike(self):
    batch, _ = scored(0.7)
    self.assertLess(scoring.mismatch(batch)['mismatch_most'], 1e-5)

  def test_kept_tokens_are_those_of_both(self):
    batch, cfg = scored(top_p=0.7, keep_sampling_mask=True)
    self.assertLess(scoring.mismatch(batch)['mismatch_most'], 1e-5)
    words = batch['kept'][batch['trained'] > 0]
    self.assertTrue((words != 0).any())
    # Without them the trainer means another distribution.
    free = batch | {'kept': np.zeros_like(batch['kept'])}
    score = scoring.scorer(tiny.model('step'), cfg)
    free['old'] = np.asarray(score(tiny.variables('step'), free))
    self.assertGreater(scoring.mismatch(free)['mismatch_most'], 0.1)

  def test_tokens_drawn_from_all_have_no_limit(self):
    batch, _ = scored(keep_sampling_mask=True)
    self.assertEqual(batch['kept'].shape[-1], 2)
    self.assertTrue((batch['kept'] == 0).all())
    self.assertLess(scoring.mismatch(batch)['mismatch_most'], 1e-5)

  def test_routes_of_the_sampler_are_replayed(self):
    batch, cfg = scored(keep_routing=True)
    self.assertLess(scoring.mismatch(batch)['mismatch_most'], 1e-5)
    route = scoring.router(tiny.model('step'))
    live = np.asarray(route(tiny.variables('step'), batch))
    self.assertEqual(
      scoring.differing(batch['routes'][:, :-1], live),
      {'differing_experts/0': 0.0, 'differing_experts/1': 0.0},
    )
    padding = batch['segments'] == 0
    self.assertTrue((batch['routes'][padding] == -1).all())
    # Other weights choose others; the replay holds them to the sampler's.
    other = np.asarray(route(moved(), batch))
    shares = scoring.differing(batch['routes'][:, :-1], other)
    self.assertGreater(min(shares.values()), 0.1)
    score = scoring.scorer(tiny.model('step'), cfg)
    free = scoring.scorer(tiny.model('step'), grpo.GRPOConfig())
    held, loose = score(moved(), batch), free(moved(), batch)
    self.assertGreater(np.abs(np.asarray(held) - loose).max(), 1e-3)
    replay = other.copy()
    known = (batch['routes'][:, :-1] >= 0).all(axis=-1)
    replay[known] = batch['routes'][:, :-1][known]
    named = batch | {'routes': np.pad(replay, [(0, 0), (0, 1), (0, 0), (0, 0)])}
    np.testing.assert_allclose(score(moved(), named), held, atol=1e-5)


class LessonTest(parameterized.TestCase):
  def test_the_prompt_is_no_answer(self):
    lesson = rollout.lesson(
      [made([3, 2])], [[1.0, 0.0]], grpo.dr_grpo(length=8)
    )
    first, second = lesson.sequences
    np.testing.assert_array_equal(first['tokens'], [1, 2, 4, 5, 6])
    np.testing.assert_array_equal(first['trained'], [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(first['advantages'], np.full(5, 0.5))
    np.testing.assert_array_equal(second['advantages'], np.full(4, -0.5))
    self.assertTrue(np.isnan(first['sampler'][:2]).all())

  def test_a_cut_answer_teaches_nothing_but_stays_in_the_mean(self):
    group = [*made([3, 3]), *made([6], whole=False)]
    cfg = dataclasses.replace(grpo.dr_grpo(length=8), mask_truncated=True)
    lesson = rollout.lesson([group], [[1.0, 0.0, 0.5]], cfg)
    self.assertLen(lesson.sequences, 2)
    self.assertEqual(lesson.sequences[0]['advantages'][0], 0.5)
    self.assertAlmostEqual(lesson.statistics['truncated'], 1 / 3)
    cfg = dataclasses.replace(cfg, mask_truncated=False)
    kept = rollout.lesson([group], [[1.0, 0.0, 0.5]], cfg)
    self.assertLen(kept.sequences, 3)

  def test_an_answer_without_a_score_is_dropped_and_counted(self):
    for wrong in (np.nan, np.inf):
      rewards = [[1.0, wrong, 0.0]]
      lesson = rollout.lesson(
        [made([3, 3, 3])], rewards, grpo.dr_grpo(length=8)
      )
      found = [s['advantages'][0] for s in lesson.sequences]
      self.assertEqual(found, [0.5, -0.5])
      self.assertAlmostEqual(lesson.statistics['unscored'], 1 / 3)
      self.assertEqual(lesson.statistics['reward'], 0.5)

  def test_equal_groups_are_counted_and_drawn_anew_if_asked(self):
    groups, rewards = [made([3, 3])] * 2, [[1.0, 0.0], [1.0, 1.0]]
    for dynamic, count in ((False, 4), (True, 2)):
      cfg = grpo.GRPOConfig(dynamic_sampling=dynamic)
      lesson = rollout.lesson(groups, rewards, cfg)
      self.assertLen(lesson.sequences, count)
      self.assertEqual(lesson.statistics['equal_groups'], 0.5)
    # A round that teaches nothing is a step all the same.
    batch = rollout.batch(rollout.lesson(groups[1:], [[1.0, 1.0]], cfg), 8, 2)
    self.assertEqual((batch['trained'] > 0).sum(), 0)
    self.assertEqual(batch['tokens'].shape, (2, 8))

  def test_a_length_penalty_makes_no_group_differ(self):
    cfg = dataclasses.replace(
      grpo.GRPOConfig(dynamic_sampling=True),
      length_penalty=LengthPenaltyConfig(8, 4),
    )
    groups = [made([2, 8]), made([2, 8])]
    # The long answer loses 1: equal ones differ then, others no longer.
    lesson = rollout.lesson(groups, [[1.0, 1.0], [1.0, 0.0]], cfg)
    self.assertLen(lesson.sequences, 2)
    self.assertEqual(lesson.statistics['equal_groups'], 0.5)
    lesson = rollout.lesson(groups, [[1.0, 1.0], [1.0, 1.0]], cfg)
    self.assertEqual(lesson.statistics['equal_groups'], 1.0)

  def test_mini_batches_part_the_answers(self):
    groups = [made([3, 4, 5, 6]), made([2, 3, 4, 5])]
    rewards = np.arange(8.0).reshape(2, 4)
    lesson = rollout.lesson(groups, rewards, grpo.dr_grpo(length=8))
    for count in (1, 2, 3, 8):
      most = -(-8 // count)
      out = rollout.mini_batches(lesson, 8, most, count, seed=5)
      rows = len(out['tokens']) // count
      parts = out['trained'].reshape(count, rows, -1).sum(axis=(1, 2))
      self.assertEqual(parts.sum(), 32)
      self.assertTrue((parts > 0).all())
      each = sorted(s['advantages'][0] for s in lesson.sequences)
      first = (out['segments'] > 0) & (out['positions'] == 0)
      self.assertEqual(sorted(out['advantages'][first]), each)
    again = rollout.mini_batches(lesson, 8, 4, 2, seed=5)
    other = rollout.mini_batches(lesson, 8, 4, 2, seed=6)
    same = lambda a, b: np.array_equal(a['advantages'], b['advantages'])
    self.assertTrue(same(again, rollout.mini_batches(lesson, 8, 4, 2, seed=5)))
    self.assertFalse(same(again, other))
    with self.assertRaisesRegex(ds.InputError, 'train.batch.size = 1: 4 answe'):
      rollout.mini_batches(lesson, 8, 1, 2, seed=5)

  def test_long_answers_are_penalised(self):
    cfg = dataclasses.replace(
      grpo.dr_grpo(length=8), length_penalty=LengthPenaltyConfig(8, 4)
    )
    lesson = rollout.lesson([made([2, 8])], [[1.0, 1.0]], cfg)
    self.assertEqual(lesson.sequences[0]['advantages'][0], 0.5)
    self.assertEqual(lesson.statistics['reward'], 1.0)  # as verified

  @parameterized.parameters(
    ([made([3])], [[1.0]], 'at least 2 answers'),
    ([made([3, 3])], [[1.0]], r'must be \[1, 2\]'),
    ([made([3, 3]), made([3])], [[1.0, 0], [1, 0]], 'groups of one size'),
  )
  def test_what_is_no_group_is_refused(self, groups, rewards, message):
    with self.assertRaisesRegex(ds.InputError, message):
      rollout.lesson(groups, rewards, grpo.GRPOConfig())

  def test_rows_are_filled_up_to_whole_steps(self):
    lesson = rollout.lesson([made([6, 6, 6])], [[1.0, 0, 0]], grpo.GRPOConfig())
    batch = rollout.batch(lesson, 8, 4, pad=63)
    self.assertEqual(batch['tokens'].shape, (4, 8))
    self.assertTrue((batch['tokens'][3] == 63).all())
    with self.assertRaisesRegex(ds.InputError, 'a sequence of 8 tokens'):
      rollout.batch(lesson, 7, 4)


class LearningTest(absltest.TestCase):
  def test_rewards_rise(self):
    """A policy learns to answer with a token that is rewarded."""
    model, variables = tiny.model('llama'), tiny.variables('llama')
    cfg = grpo.GRPOConfig()
    rollouts = rollout.RolloutConfig(group=8, most=1)
    recipe = train.TrainConfig(
      1e6,
      ds.BatchConfig(4),
      optimizer=ds.OptimizerConfig(decay=0.0),
      schedule=ds.ScheduleConfig('constant', peak=2e-2, warmup=0),
    )
    state = train.initial_state(model, recipe, variables)
    update = jax.jit(train.train_step(model, recipe, cfg))
    held = EngineConfig(slots=16, context=16, page=8, budget=16, steps=1)
    run = Engine(model, variables, held)
    means = []
    for number in range(12):
      groups = rollout.sample(
        run, PROMPTS, rollouts, stop=STOP, seed=1000 * number
      )
      rewards = np.array(
        [[float(r.tokens[0] < 16) for r in group] for group in groups]
      )
      lesson = rollout.lesson(groups, rewards, cfg)
      means.append(lesson.statistics['reward'])
      if lesson.statistics['equal_groups'] == 1:
        continue
      batch = rollout.batch(lesson, 12, 16)
      state, _ = update(state, batch)
      run.load({'params': state.params, 'buffers': state.buffers})
    self.assertGreater(np.mean(means[-3:]), np.mean(means[:3]) + 0.3)


if __name__ == '__main__':
  absltest.main()
