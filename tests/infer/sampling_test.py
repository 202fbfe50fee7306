"""Sampling: its probabilities are the training model's own."""

import dataclasses
import functools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.infer import sampling as lib
from deepseek_jax.infer.sampling import SampleConfig
from tests import tiny

PROMPT = [[5, 9, 2, 33, 7], [11], [3, 1, 4, 1, 5, 9, 2, 6, 5]]
NEW = 10
SLOTS = 32
PLAIN = SampleConfig()


def run(name='v3', prompt=PROMPT, cfg=PLAIN, new=NEW, seed=0):
  return lib.sample(
    tiny.model(name),
    tiny.variables(name),
    prompt,
    cfg,
    max_new_tokens=new,
    key=jax.random.key(seed),
  )


def forward(name, rows):
  """Log-probabilities [B 32 V] of a training-style pass over padded rows."""
  tokens = np.zeros((len(rows), SLOTS), np.int32)
  segments = np.zeros_like(tokens)
  for b, row in enumerate(rows):
    tokens[b, : len(row)] = row
    segments[b, : len(row)] = 1
  out = tiny.jitted(name, train=True)(
    tiny.variables(name), tokens, segment_ids=segments
  )
  return np.asarray(jax.nn.log_softmax(out.logits))


class SampleTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v3', SampleConfig()),
    ('v3', SampleConfig(0.7, 20, 0.9)),
    ('gqa', SampleConfig(1.5)),
  )
  def test_log_probs_equal_those_of_a_training_forward(self, name, cfg):
    out = run(name, cfg=cfg)
    self.assertEqual(out.tokens.shape, (3, NEW))
    rows = [p + t.tolist() for p, t in zip(PROMPT, out.tokens)]
    want = forward(name, rows)
    for b, prompt in enumerate(PROMPT):
      at = np.arange(len(prompt) - 1, len(prompt) + NEW - 1)
      np.testing.assert_allclose(
        out.log_probs[b], want[b, at, out.tokens[b]], atol=1e-5, rtol=1e-5
      )

  @parameterized.parameters(10**9, 10**13)
  def test_a_cache_beyond_all_memory_is_refused(self, new):
    model = tiny.model('gqa')
    for draw in (ds.generate, lambda *a, **k: next(lib.stream(*a, **k))):
      with self.assertRaisesRegex(
        ds.InputError, f'max_new_tokens = {new}: the'
      ):
        draw(
          model,
          tiny.variables('gqa'),
          PROMPT * 1000,
          max_new_tokens=new,
          key=jax.random.key(0),
        )

  @parameterized.parameters('mixed', 'gqa')
  def test_greedy_takes_the_argmax_at_every_step(self, name):
    cfg = SampleConfig(temperature=0.0)
    got = run(name, cfg=cfg).tokens
    rows = [list(p) for p in PROMPT]
    for _ in range(NEW):
      scores = forward(name, rows)
      for b, row in enumerate(rows):
        row.append(int(scores[b, len(row) - 1].argmax()))
    for b, prompt in enumerate(PROMPT):
      self.assertEqual(got[b].tolist(), rows[b][len(prompt) :])
    lists = ds.generate(
      tiny.model(name),
      tiny.variables(name),
      PROMPT,
      max_new_tokens=NEW,
      temperature=0.0,
    )
    self.assertEqual(lists, got.tolist())

  def test_a_row_does_not_depend_on_the_other_rows(self):
    others = [PROMPT[0], [60, 61, 62], [8] * 20]
    first, second = run(), run(prompt=others)
    np.testing.assert_array_equal(first.tokens[0], second.tokens[0])
    np.testing.assert_allclose(
      first.log_probs[0], second.log_probs[0], atol=1e-5
    )
    self.assertFalse(np.array_equal(first.tokens[1], second.tokens[1]))

  def test_a_key_gives_the_same_tokens_again_and_another_key_others(self):
    np.testing.assert_array_equal(run().tokens, run().tokens)
    self.assertFalse(np.array_equal(run().tokens, run(seed=1).tokens))
    same = run(prompt=[PROMPT[0]] * 3).tokens
    self.assertFalse(np.array_equal(same[0], same[1]))

  def test_rows_end_with_their_stop_token(self):
    free = run('gqa').tokens
    stop = (int(free[0, 3]), int(free[1, 6]))
    cfg = SampleConfig(stop=stop)
    out = run('gqa', cfg=cfg)
    lists = ds.generate(
      tiny.model('gqa'),
      tiny.variables('gqa'),
      PROMPT,
      max_new_tokens=NEW,
      stop=stop,
      key=jax.random.key(0),
    )
    for b in range(3):
      hits = [i for i, t in enumerate(free[b]) if t in stop]
      length = hits[0] + 1 if hits else NEW
      self.assertEqual(int(out.lengths[b]), length)
      self.assertEqual(lists[b], free[b, :length].tolist())
    self.assertLess(int(out.lengths[0]), NEW)
    # The stream goes on until every row has met one.
    drawn = list(
      lib.stream(
        tiny.model('gqa'),
        tiny.variables('gqa'),
        PROMPT,
        cfg,
        max_new_tokens=NEW,
        key=jax.random.key(0),
      )
    )
    self.assertLen(drawn, int(out.lengths.max()))
    np.testing.assert_array_equal(
      np.stack(drawn, axis=1), free[:, : len(drawn)]
    )

  def test_all_rows_stopped_ends_the_loop_early(self):
    greedy = run('gqa', cfg=SampleConfig(0.0), prompt=[PROMPT[0]] * 3).tokens
    cfg = SampleConfig(0.0, stop=(int(greedy[0, 0]),))
    out = run('gqa', cfg=cfg, prompt=[PROMPT[0]] * 3)
    self.assertEqual(out.lengths.tolist(), [1, 1, 1])
    np.testing.assert_array_equal(out.log_probs[:, 1:], 0)  # never drawn

  def test_prepared_variables_give_the_same(self):
    model = tiny.model('v3')
    ready = lib.prepare(model, tiny.variables('v3'))
    self.assertIs(lib.prepare(model, ready), ready)
    got = lib.sample(
      model, ready, PROMPT, max_new_tokens=NEW, key=jax.random.key(0)
    )
    np.testing.assert_array_equal(got.tokens, run().tokens)


@functools.cache
def logits(V=9):
  return np.random.default_rng(0).normal(size=(40, V)).astype(np.float32) * 2


def allowed(row, cfg):
  """The set that a draw may come from, by going down the sorted tokens."""
  scaled = np.float64(row) / cfg.temperature
  order = sorted(range(len(row)), key=lambda i: -scaled[i])
  if cfg.top_k:
    order = order[: cfg.top_k]
  p = np.exp(scaled[order] - scaled[order].max())
  p /= p.sum()
  kept, mass = [], 0.0
  for i, share in zip(order, p):
    kept.append(i)
    mass += share
    if mass >= cfg.top_p:
      break
  return set(kept)


class DrawTest(parameterized.TestCase):
  @parameterized.parameters(
    SampleConfig(),
    SampleConfig(top_k=1),
    SampleConfig(top_k=4),
    SampleConfig(top_k=99),
    SampleConfig(top_p=0.5),
    SampleConfig(top_p=1e-6),
    SampleConfig(0.5, top_p=0.9),
    SampleConfig(2.0, 5, 0.8),
  )
  def test_top_k_and_top_p_keep_exactly_their_sets(self, cfg):
    got = np.asarray(lib.restrict(jnp.asarray(logits()), cfg))
    for row, kept in zip(logits(), got):
      finite = np.isfinite(kept)
      self.assertEqual(set(np.flatnonzero(finite)), allowed(row, cfg))
      np.testing.assert_allclose(
        kept[finite], (row[finite] - row.max()) / cfg.temperature, atol=1e-6
      )

  @parameterized.parameters(
    (SampleConfig(top_k=1), [0]),
    (SampleConfig(top_k=3), [0, 1, 2]),
    (SampleConfig(top_p=0.3), [0, 1, 2]),
    (SampleConfig(top_k=4, top_p=0.5), [0, 1]),
  )
  def test_ties_at_the_border_go_to_the_lower_numbers(self, cfg, want):
    got = np.asarray(lib.restrict(jnp.full((1, 8), 0.5), cfg))
    self.assertEqual(np.flatnonzero(np.isfinite(got[0])).tolist(), want)

  def test_the_least_temperature_draws_the_likeliest(self):
    got = lib.restrict(jnp.asarray([[1.0, 2, 30, 9]]), SampleConfig(1e-38))
    self.assertEqual(np.flatnonzero(np.isfinite(got[0])).tolist(), [2])

  def test_draws_follow_the_tempered_probabilities(self):
    rows, cfg = 20000, SampleConfig(0.7, top_k=6)
    one = logits()[0]
    many = jnp.broadcast_to(one, (rows, 9))
    draw = jax.jit(lib.draw, static_argnums=3)
    drawn = draw(many, jax.random.key(1), 0, cfg)
    share = np.bincount(drawn, minlength=9) / rows
    kept = sorted(allowed(one, cfg))
    want = np.zeros(9)
    want[kept] = np.exp(np.float64(one[kept]) / 0.7)
    want /= want.sum()
    # Five standard deviations of a binomial share.
    np.testing.assert_array_less(
      np.abs(share - want), 5 * np.sqrt(want * (1 - want) / rows) + 1e-9
    )
    other = draw(many, jax.random.key(1), 1, cfg)
    self.assertFalse(np.array_equal(drawn, other))

  def test_a_draw_depends_on_key_row_and_index_alone(self):
    draw = jax.jit(lib.draw, static_argnums=3)
    key, cfg = jax.random.key(0), SampleConfig()
    few = draw(jnp.asarray(logits()[:5]), key, 3, cfg)
    all_rows = draw(jnp.asarray(logits()), key, 3, cfg)
    np.testing.assert_array_equal(few, all_rows[:5])


class MistakesTest(parameterized.TestCase):
  @parameterized.parameters(
    ([], 'prompt: needs at least one row, each with a token'),
    ([[1], []], 'prompt: needs at least one row, each with a token'),
    ([[1, 64]], 'prompt: token 64 is outside the vocabulary of 64'),
    ([[1, -2]], 'prompt: token -2 is outside the vocabulary of 64'),
  )
  def test_prompts_that_mean_nothing_are_refused(self, prompt, message):
    with self.assertRaisesRegex(ds.InputError, message):
      run(prompt=prompt)

  def test_a_cache_too_short_is_refused(self):
    with self.assertRaisesRegex(
      ds.InputError, 'slots = 32: 9 prompt and 24 new tokens need 33; raise'
    ):
      lib.sample(
        tiny.model('v3'),
        tiny.variables('v3'),
        PROMPT,
        max_new_tokens=24,
        key=jax.random.key(0),
        slots=32,
      )

  @parameterized.parameters((24, 64), (32, 64), (56, 128), (120, 192))
  def test_a_cache_is_whole_pages_of_the_decoding_kernel(self, new, want):
    class Seen(Exception):
      pass

    def look(model, rows, slots, new):
      raise Seen(slots)

    with (
      mock.patch.object(lib, '_check_room', look),
      self.assertRaises(Seen) as seen,
    ):
      run(new=new)
    self.assertEqual(seen.exception.args, (want,))

  def test_no_new_tokens_are_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'max_new_tokens = 0: must be'):
      run(new=0)

  def test_sampling_needs_a_key(self):
    with self.assertRaisesRegex(ds.InputError, 'key: sampling at a temp'):
      ds.generate(
        tiny.model('v3'), tiny.variables('v3'), PROMPT, max_new_tokens=2
      )

  @parameterized.parameters(
    {'temperature': -0.1},
    {'temperature': math.nan},
    {'top_k': -1},
    {'top_p': 0.0},
    {'top_p': 1.1},
  )
  def test_settings_out_of_range_are_refused(self, **fields):
    with self.assertRaisesRegex(
      ds.InputError, '(temperature|top_k|top_p) = .*: must '
    ):
      SampleConfig(**fields)


class AgainTest(parameterized.TestCase):
  def test_equal_configurations_compile_once(self):
    counted = []
    jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: counted.append('compile' in event)
    )
    draws = []
    for _ in range(3):
      model = ds.build(dataclasses.replace(tiny.config('gqa')))
      before = sum(counted)
      draws.append(
        ds.generate(
          model, tiny.variables('gqa'), PROMPT, max_new_tokens=3, key=1
        )
      )
    self.assertGreater(before, 0)
    self.assertEqual(sum(counted), before)
    self.assertEqual(draws[1:], draws[:-1])

  @parameterized.parameters(
    ([1, 2, 3], 'prompt: 1 is no row of token ids'),
    (['hello'], "prompt: 'hello' is no row"),
    ([[1.5]], 'prompt: .1.5. is no row'),
    ([[[1]]], 'prompt: .* is no row'),
    ([[2**32 + 5]], 'prompt: token .* outside the vocabulary'),
    ([[-1]], 'prompt: token -1 is outside'),
  )
  def test_what_is_no_prompt_is_named(self, prompt, message):
    with self.assertRaisesRegex(ds.InputError, message):
      run('gqa', prompt)

  def test_a_stop_that_is_no_list_is_named(self):
    args = tiny.model('gqa'), tiny.variables('gqa'), PROMPT
    with self.assertRaisesRegex(ds.InputError, 'stop = 5: must be a tuple'):
      ds.generate(*args, max_new_tokens=1, stop=5, key=0)


if __name__ == '__main__':
  absltest.main()
