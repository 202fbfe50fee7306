"""Attention cores against a loop over heads and queries in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.model.attention.softmax import (
  cached_attention,
  causal_attention,
)
from tests import reference

SCALE = 0.4


def inputs(T, H=4, G=2, K=6, V=5, B=2):
  rng = np.random.default_rng(0)
  q, k, v = (
    rng.normal(size=(B, T, *s)).astype(np.float32)
    for s in ((H, K), (G, K), (G, V))
  )
  segments = np.sort(rng.integers(0, 3, (B, T))).astype(np.int32)
  return q, k, v, segments


def wanted(q, k, v, segments):
  """[B T H V] float64, with one softmax over each masked row of scores."""
  B, T, H, _ = q.shape
  share, out = H // k.shape[2], []
  for b in range(B):
    seen = np.tril(np.ones((T, T), bool))
    seen &= segments[b][:, None] == segments[b][None]
    heads = []
    for h in range(H):
      scores = np.float64(q[b, :, h]) @ np.float64(k[b, :, h // share]).T
      weights = reference.softmax(np.where(seen, scores * SCALE, -np.inf))
      heads.append(weights @ np.float64(v[b, :, h // share]))
    out.append(np.stack(heads, axis=1))
  return np.stack(out)


def gradients(q, k, v, segments, g):
  """Of sum(out * g), by hand: ds = p * (dp - sum(p * dp))."""
  q, k, v, g = (np.float64(a) for a in (q, k, v, g))
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  B, T, H, _ = q.shape
  for b in range(B):
    seen = np.tril(np.ones((T, T), bool))
    seen &= segments[b][:, None] == segments[b][None]
    for h in range(H):
      j = h // (H // k.shape[2])
      scores = np.where(seen, q[b, :, h] @ k[b, :, j].T * SCALE, -np.inf)
      p = reference.softmax(scores)
      dp = g[b, :, h] @ v[b, :, j].T
      ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * SCALE
      dq[b, :, h] += ds @ k[b, :, j]
      dk[b, :, j] += ds.T @ q[b, :, h]
      dv[b, :, j] += p.T @ g[b, :, h]
  return dq, dk, dv


class CausalAttentionTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('one_block', 11, 8, True),
    ('three_blocks', 300, 8, True),
    ('three_blocks_of_one_document', 300, 8, False),
    ('two_blocks', 300, 2, True),
  )
  def test_value_and_gradients_equal_float64(self, T, blocks, split):
    q, k, v, segments = inputs(T)
    if not split:
      segments = np.ones_like(segments)
    g = np.random.default_rng(1).normal(size=(2, T, 4, 5)).astype(np.float32)
    run = functools.partial(
      causal_attention,
      scale=SCALE,
      segments=jnp.asarray(segments) if split else None,
      blocks=blocks,
    )

    @jax.jit
    def both(q, k, v):
      out, pull = jax.vjp(run, q, k, v)
      return out, pull(g)

    out, grads = both(q, k, v)
    np.testing.assert_allclose(
      out, wanted(q, k, v, segments), rtol=1e-4, atol=2e-6
    )
    for got, want in zip(grads, gradients(q, k, v, segments, g)):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)

  def test_bfloat16_keeps_its_softmax_in_float32(self):
    q, k, v, segments = inputs(40)
    q, k, v = (jnp.asarray(a, jnp.bfloat16) for a in (q, k, v))
    out = causal_attention(q, k, v, scale=SCALE, segments=segments)
    self.assertEqual(out.dtype, jnp.bfloat16)
    want = wanted(*(np.asarray(a, np.float64) for a in (q, k, v)), segments)
    # Probabilities and outputs are rounded to 8 bits, scores are not.
    np.testing.assert_allclose(np.float64(out), want, atol=2e-2, rtol=2e-2)

  def test_huge_scores_stay_finite(self):
    q, k, v, _ = inputs(9)
    run = lambda q: causal_attention(q, k, v, scale=1e4).sum()
    value, grad = jax.value_and_grad(run)(jnp.asarray(q))
    self.assertTrue(np.isfinite(value))
    self.assertTrue(np.isfinite(grad).all())


class CachedAttentionTest(parameterized.TestCase):
  def test_a_query_sees_exactly_the_slots_up_to_its_position(self):
    q, k, v, _ = inputs(12)
    positions = np.array([[0, 1, 11], [3, 7, 2]], np.int32)
    got = cached_attention(q[:, :3], k, v, jnp.asarray(positions), scale=SCALE)
    for b in range(2):
      for t, p in enumerate(positions[b]):
        for h in range(4):
          scores = np.float64(k[b, : p + 1, h // 2]) @ q[b, t, h] * SCALE
          want = reference.softmax(scores) @ v[b, : p + 1, h // 2]
          np.testing.assert_allclose(got[b, t, h], want, rtol=1e-4, atol=1e-6)


if __name__ == '__main__':
  absltest.main()
