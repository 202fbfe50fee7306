"""Draws by each row's settings, against transformers' logits processors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl.testing import absltest, parameterized

from deepseek_jax.infer import sampler
from deepseek_jax.infer.request import Request, Sampling

V, H = 40, 24
PROMPT, LENGTH = 7, 15


def logits(rows, seed=0):
  drawn = np.random.default_rng(seed).normal(size=(rows, V))
  return (3 * drawn).astype(np.float32)


def packed(settings, allowed=None, seed=1):
  """Settings of rows, whose histories are random: 7 tokens are the prompt."""
  rng = np.random.default_rng(seed)
  history = rng.integers(0, V, (len(settings), H)).astype(np.int32)
  prompt = tuple(range(PROMPT))
  each = [
    sampler.settings(Request(prompt, 1, s, logprobs=3), s.seed, V)
    for s in settings
  ]
  draws = sampler.pack(each, allowed or [None] * len(each), history, V)
  return jax.tree.map(jnp.asarray, draws), history


def lengths(rows):
  return jnp.full(rows, LENGTH)


def reference(how, scores, history):
  """One row by transformers; the additive penalties by their definition."""
  t = transformers
  ids = torch.tensor(history[None, :LENGTH].astype(np.int64))
  scores = torch.tensor(scores[None].copy())
  if how.repetition_penalty != 1:
    scores = t.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)(
      ids, scores
    )
  times = np.bincount(history[PROMPT:LENGTH], minlength=V)
  scores = scores - torch.tensor(
    how.presence_penalty * (times > 0) + how.frequency_penalty * times
  )
  for token, value in how.logit_bias:
    scores[0, token] += value
  if how.temperature not in (0, 1):
    scores = t.TemperatureLogitsWarper(how.temperature)(ids, scores)
  if how.top_k:
    scores = t.TopKLogitsWarper(how.top_k)(ids, scores)
  if how.top_p < 1:
    scores = t.TopPLogitsWarper(how.top_p)(ids, scores)
  if how.min_p:
    scores = t.MinPLogitsWarper(how.min_p)(ids, scores)
  return torch.log_softmax(scores.double(), -1)[0].numpy()


SETTINGS = (
  Sampling(),
  Sampling(0.5),
  Sampling(1.7, top_k=5),
  Sampling(top_p=0.6),
  Sampling(0.8, top_k=20, top_p=0.9),
  Sampling(min_p=0.1),
  Sampling(2.0, top_p=0.95, min_p=0.05),
  Sampling(repetition_penalty=1.6),
  Sampling(repetition_penalty=0.7),
  Sampling(presence_penalty=1.5, frequency_penalty=-0.4),
  Sampling(logit_bias=((3, 5.0), (7, -100.0))),
  Sampling(
    0.7,
    12,
    0.85,
    0.02,
    1.2,
    0.3,
    0.2,
    ((1, 2.0), (39, 1.0)),
  ),
)


class DistributionTest(parameterized.TestCase):
  def test_every_setting_is_transformers_own_in_one_batch(self):
    draws, history = packed(SETTINGS)
    scores = logits(len(SETTINGS))
    moved = sampler.adjusted(jnp.asarray(scores), draws, lengths(len(scores)))
    got = jax.nn.log_softmax(sampler.restricted(moved, draws), axis=-1)
    for row, how in enumerate(SETTINGS):
      want = reference(how, scores[row], history[row])
      with self.subTest(how=how):
        np.testing.assert_array_equal(np.isfinite(got[row]), np.isfinite(want))
        seen = np.isfinite(want)
        np.testing.assert_allclose(
          np.asarray(got[row])[seen], want[seen], rtol=1e-5, atol=1e-5
        )

  def test_a_row_is_drawn_the_same_in_any_batch(self):
    draws, _ = packed(SETTINGS)
    scores = jnp.asarray(logits(len(SETTINGS)))
    every = jax.jit(sampler.draw)(scores, draws, lengths(len(SETTINGS)))
    for row in range(len(SETTINGS)):
      alone = jax.tree.map(lambda a, r=row: a[r : r + 1], draws)
      got = jax.jit(sampler.draw)(scores[row : row + 1], alone, lengths(1))
      for a, b in zip(got, every):
        np.testing.assert_array_equal(a[0], b[row])

  def test_what_a_grammar_forbids_is_never_drawn(self):
    allowed = {2, 31, 33}
    bits = np.zeros(2, np.int32).view(np.uint32)
    for token in allowed:
      bits[token // 32] |= np.uint32(1 << token % 32)
    many = [dataclasses.replace(Sampling(), seed=s) for s in range(64)]
    draws, _ = packed(many, [bits.view(np.int32)] * 64)
    one = jnp.asarray(np.repeat(logits(1), 64, axis=0))
    drawn = sampler.draw(one, draws, lengths(64))
    self.assertEqual(set(np.asarray(drawn.token).tolist()), allowed)
    kept = np.full(V, -np.inf)
    kept[list(allowed)] = logits(1)[0, list(allowed)]
    want = kept - np.log(np.exp(kept[list(allowed)]).sum())
    at = np.asarray(drawn.token)
    np.testing.assert_allclose(drawn.sampled, want[at], atol=1e-5)
    raw = np.asarray(jax.nn.log_softmax(logits(1)[0]))
    np.testing.assert_allclose(drawn.logprob, raw[at], atol=1e-5)

  def test_draws_follow_the_distribution(self):
    rows = 4000
    many = [Sampling(0.9, top_k=6, seed=s) for s in range(rows)]
    draws, _ = packed(many)
    one = logits(1)
    drawn = jax.jit(sampler.draw)(
      jnp.asarray(np.repeat(one, rows, axis=0)), draws, lengths(rows)
    )
    share = np.bincount(drawn.token, minlength=V) / rows
    want = np.exp(reference(many[0], one[0], np.zeros(H, np.int32)))
    # Five standard deviations of a binomial share.
    np.testing.assert_array_less(
      np.abs(share - want), 5 * np.sqrt(want * (1 - want) / rows) + 1e-9
    )

  def test_seeds_and_positions_draw_for_themselves(self):
    seeds = [0, 1, 2**32, 2**33, -1, 2**63]
    draws, _ = packed([Sampling(3.0, seed=s) for s in seeds])
    one = jnp.asarray(np.repeat(logits(1), len(seeds), axis=0))
    drawn = {
      tuple(
        int(sampler.draw(one, draws, jnp.full(6, at)).token[row])
        for at in range(8)
      )
      for row in range(len(seeds))
    }
    self.assertLen(drawn, len(seeds))

  def test_the_likeliest_are_given_when_wanted(self):
    draws, _ = packed([Sampling()])
    scores = logits(1)
    drawn = sampler.draw(jnp.asarray(scores), draws, lengths(1))
    order = np.argsort(-scores[0])[: sampler.TOP]
    np.testing.assert_array_equal(drawn.top[0], order)
    want = np.asarray(jax.nn.log_softmax(scores[0]))[order]
    np.testing.assert_allclose(drawn.top_logprob[0], want, atol=1e-5)

  @parameterized.parameters(np.nan, np.inf)
  def test_logits_that_are_not_finite_are_named(self, wrong):
    draws, _ = packed([Sampling()] * 2)
    scores = logits(2)
    scores[1, 5] = wrong
    drawn = sampler.draw(jnp.asarray(scores), draws, lengths(2))
    self.assertEqual(drawn.sound.tolist(), [True, False])


if __name__ == '__main__':
  absltest.main()
