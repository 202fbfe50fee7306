"""sparse_mla against loops over queries and heads in float64."""

import functools
import itertools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import compat
from pallas_kernels.sparse_mla import (
  ChosenKeys,
  attend,
  forward,
  latent_gradient,
  shares,
  sparse_mla,
)
from pallas_kernels.sparse_mla.shapes import TEST, TEST_LISTS

C, R, SCALE = 12, 4, 0.4


def draw(shape, seed=0):
  """q_c, q_r, c, k_r in float64, and choices without repetition."""
  rng = np.random.default_rng(seed)
  B, T, S = shape.batch, shape.queries, shape.keys
  normal = lambda *size: rng.normal(size=size)
  index = np.stack(
    [np.sort(rng.permutation(S)[: shape.top_k]) for _ in range(B * T)]
  ).reshape(B, T, -1)
  index = np.where(rng.random(index.shape) < shape.nothing, -1, index)
  H = shape.heads
  arrays = normal(B, T, H, C), normal(B, T, H, R), normal(B, S, C)
  return *arrays, normal(B, S, R), index.astype(np.int32)


def loop(q_c, q_r, c, k_r, index):
  out = np.zeros(q_c.shape)
  for b, t, h in np.ndindex(q_c.shape[:3]):
    at = [i for i in index[b, t] if i >= 0]
    if not at:
      continue
    scores = SCALE * (c[b, at] @ q_c[b, t, h] + k_r[b, at] @ q_r[b, t, h])
    weights = np.exp(scores - scores.max())
    out[b, t, h] = weights @ c[b, at] / weights.sum()
  return out


jitted = jax.jit(functools.partial(sparse_mla, scale=SCALE, impl='reference'))


def draw_lists(shape, seed=0):
  """Queries, one or two lists of keys, and sinks, in float64."""
  rng = np.random.default_rng(seed)
  B, T, H, C, R = *shape[:2], shape.heads, shape.width, shape.rope
  normal = lambda *size: rng.normal(size=size)
  rope = lambda *size: normal(*size, R) if R else None
  keys = []
  for S, K in filter(None, ((shape.keys, shape.top_k), shape.far)):
    index = rng.integers(0, S, (B, T, K))
    index = np.where(rng.random(index.shape) < shape.nothing, -1, index)
    keys.append(ChosenKeys(normal(B, S, C), rope(B, S), index.astype(np.int32)))
  sinks = normal(H) if shape.sinks else None
  return normal(B, T, H, C), rope(B, T, H), tuple(keys), sinks


def loop_lists(q_c, q_r, keys, sinks):
  """The output and its log-sum-exp: one score after the other."""
  out, log_sums = np.zeros(q_c.shape), np.full(q_c.shape[:-1], -1e30)
  for b, t, h in np.ndindex(q_c.shape[:3]):
    rows, scores = [], []
    for c, k_r, index in keys:
      for i in index[b, t]:
        if i < 0:
          continue
        rows.append(c[b, i])
        score = c[b, i] @ q_c[b, t, h]
        if q_r is not None:
          score += k_r[b, i] @ q_r[b, t, h]
        scores.append(SCALE * score)
    if sinks is not None:
      rows.append(np.zeros(q_c.shape[-1]))
      scores.append(sinks[h])
    if scores:
      log_sums[b, t, h] = np.log(np.exp(scores).sum())
      out[b, t, h] = np.exp(scores - log_sums[b, t, h]) @ np.stack(rows)
  return out, log_sums


class SharesTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST_LISTS.items())
  def test_they_equal_a_loop_in_float64(self, shape):
    q_c, q_r, keys, sinks = draw_lists(shape)
    _, log_sum = loop_lists(q_c, q_r, keys, sinks)
    narrow = lambda tree: jax.tree.map(
      lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, tree
    )
    total = np.zeros(q_c.shape[:2])
    for c, k_r, index in keys:
      want = np.zeros(index.shape)
      for b, t, k in np.ndindex(index.shape):
        i = index[b, t, k]
        if i < 0:
          continue
        scores = q_c[b, t] @ c[b, i]
        if q_r is not None:
          scores += q_r[b, t] @ k_r[b, i]
        want[b, t, k] = np.exp(SCALE * scores - log_sum[b, t]).mean()
      one = narrow(ChosenKeys(c, k_r, index))
      got = shares(*narrow((q_c, q_r)), one, np.float32(log_sum), scale=SCALE)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
      total += want.sum(-1)
    # Both lists and the sink share 1, where anything is chosen.
    self.assertTrue((total < 1 + 1e-9).all())
    if not shape.sinks:
      some = sum((k.index >= 0).any(-1) for k in keys) > 0
      np.testing.assert_allclose(total[some], 1)

  def test_they_have_no_gradient_and_check_their_sums(self):
    q_c, q_r, (keys,), _ = draw_lists(TEST_LISTS['sinks'])
    log_sum = np.zeros(q_c.shape[:-1])
    run = lambda q: shares(q, q_r, keys, log_sum, scale=SCALE).sum()
    np.testing.assert_array_equal(jax.grad(run)(q_c), 0)
    with self.assertRaisesRegex(ValueError, r'log_sum is \[1, 3\]'):
      shares(q_c, q_r, keys, log_sum[..., 0], scale=SCALE)


class ListsTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST_LISTS.items())
  def test_lists_and_sinks_equal_a_loop_in_float64(self, shape):
    drawn = draw_lists(shape)
    floats, tree = jax.tree.flatten(drawn)
    real = [i for i, a in enumerate(floats) if a.dtype == np.float64]

    def run(f, *moved):
      new = list(floats)
      for i, a in zip(real, moved):
        new[i] = a
      return f(*jax.tree.unflatten(tree, new))

    op = lambda q_c, q_r, keys, sinks: attend(
      q_c, q_r, keys, scale=SCALE, sinks=sinks, impl='reference'
    )
    narrow = [floats[i].astype(np.float32) for i in real]
    (got, log_sum), pull = jax.vjp(lambda *a: run(op, *a), *narrow)
    want, want_log_sum = loop_lists(*drawn)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(log_sum, want_log_sum, rtol=2e-5, atol=2e-5)
    weight = np.cos(np.arange(got.size)).reshape(got.shape)
    # The log-sum-exp has no gradient.
    grads = pull((jnp.asarray(weight, jnp.float32), jnp.ones_like(log_sum)))
    rng = np.random.default_rng(1)
    ways = [rng.normal(size=floats[i].shape) for i in real]
    ahead, behind = (
      run(loop_lists, *(floats[i] + step * w for i, w in zip(real, ways)))[0]
      for step in (1e-5, -1e-5)
    )
    slope = ((ahead - behind) * weight).sum() / 2e-5
    along = sum((g * way).sum() for g, way in zip(grads, ways))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)

  def test_two_lists_are_one_softmax(self):
    q_c, q_r, (near, far), _ = draw_lists(TEST_LISTS['two_lists'])
    got, _ = attend(q_c, q_r, (near, far), scale=SCALE)
    S = near.c.shape[1]
    index = np.where(far.index >= 0, far.index + S, -1)
    c, k_r = (np.concatenate(a, axis=1) for a in zip(near[:2], far[:2]))
    one = np.concatenate([near.index, index], axis=2)
    want = sparse_mla(q_c, q_r, c, k_r, one, scale=SCALE)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)

  def test_a_sink_of_minus_infinity_is_none_and_one_of_inf_takes_all(self):
    q_c, q_r, keys, _ = draw_lists(TEST_LISTS['sinks'])
    plain, plain_sum = attend(q_c, q_r, keys, scale=SCALE)
    sinks = np.asarray([-np.inf, 1e4], np.float32)
    got, log_sum = attend(q_c, q_r, keys, scale=SCALE, sinks=sinks)
    np.testing.assert_allclose(got[:, :, 0], plain[:, :, 0], rtol=1e-6)
    np.testing.assert_allclose(log_sum[..., 0], plain_sum[..., 0], rtol=1e-6)
    self.assertFalse(got[:, :, 1].any())
    np.testing.assert_allclose(log_sum[..., 1], 1e4)

  def test_bad_lists_are_named(self):
    q_c, q_r, keys, sinks = draw_lists(TEST_LISTS['sinks'])
    how = {'scale': SCALE}
    for args, more, message in (
      ((q_c, q_r, ()), {}, 'keys are 0 lists'),
      ((q_c, q_r, keys * 3), {}, 'keys are 3 lists'),
      ((q_c, None, keys), {}, 'q_r and k_r are arrays or None'),
      ((q_c, q_r, keys), {'sinks': sinks[:1]}, r'sinks are \[1\], not'),
    ):
      with self.assertRaisesRegex(ValueError, message):
        attend(*args, **how, **more)


class SparseMlaTest(parameterized.TestCase):
  @parameterized.named_parameters(TEST.items())
  def test_value_and_gradient_equal_a_loop_in_float64(self, shape):
    *floats, index = draw(shape)
    narrow = [a.astype(np.float32) for a in floats]
    got, pull = jax.vjp(lambda *a: jitted(*a, index), *narrow)
    np.testing.assert_allclose(got, loop(*floats, index), rtol=2e-5, atol=2e-5)
    weight = np.cos(np.arange(got.size)).reshape(got.shape)
    grads = pull(jnp.asarray(weight, jnp.float32))
    rng = np.random.default_rng(1)
    ways = [rng.normal(size=a.shape) for a in floats]
    ahead, behind = (
      loop(*(a + step * way for a, way in zip(floats, ways)), index)
      for step in (1e-5, -1e-5)
    )
    slope = ((ahead - behind) * weight).sum() / 2e-5
    along = sum((g * way).sum() for g, way in zip(grads, ways))
    np.testing.assert_allclose(along, slope, rtol=1e-4, atol=1e-4)

  def test_a_latent_that_all_queries_chose_gets_all_of_its_gradient(self):
    one = lambda *shape: jnp.ones(shape, jnp.bfloat16)
    queries = one(1, 2048, 1, C), one(1, 2048, 1, R)
    index = jnp.zeros((1, 2048, 1), jnp.int32)
    total = lambda c: jitted(*queries, c, one(1, 4, R), index).sum()
    grad = jax.grad(total)(one(1, 4, C))
    self.assertEqual(grad.dtype, jnp.bfloat16)
    self.assertEqual(grad[0, 0].tolist(), [2048] * C)  # it was 256

  @parameterized.parameters(3, 0)  # what stands in for no choice may be 0
  def test_latents_that_are_not_chosen_do_not_count_even_if_nan(self, at):
    q_c, q_r, c, k_r, index = draw(TEST['some_none'])
    index[index == at] = -1
    want = jitted(q_c, q_r, c, k_r, index)
    c[:, at], k_r[:, at] = np.nan, np.nan
    np.testing.assert_array_equal(jitted(q_c, q_r, c, k_r, index), want)

  def test_no_array_of_queries_by_keys_is_made(self):
    T, S, K, H = 512, 640, 64, 2
    shapes = [(1, T, H, 64), (1, T, H, 8), (1, S, 64), (1, S, 8)]
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    index = jax.ShapeDtypeStruct((1, T, K), jnp.int32)

    def loss(*args):
      return sparse_mla(*args, scale=1.0, impl='reference').sum()

    text = jax.jit(jax.grad(loss, (0, 2))).lower(*args, index).as_text()
    shapes = re.findall(r'tensor<([0-9x]+)x[a-z]', text)
    sizes = [set(map(int, shape.split('x'))) for shape in shapes]
    self.assertTrue(any({T, K} <= size for size in sizes))
    self.assertFalse([size for size in sizes if {T, S} <= size])

  def test_parts_of_a_latent_are_listed_in_order_of_the_queries(self):
    at = jnp.asarray([[2, 0, -1], [0, 2, 2], [-1, 2, 1]]).reshape(-1)
    order, starts = latent_gradient._lists(at, 4)
    lists = [list(order[a:b]) for a, b in itertools.pairwise(starts)]
    self.assertEqual(lists, [[1, 3], [8], [0, 4, 5, 7], []])

  @parameterized.parameters(
    (8, 32, 16),  # 2 x 2 queries of 128 heads fill 128 of 132
    (40, 32, 3),
    (1, 32, 16),  # two blocks each, at least
    (67, 32, 1),  # most of the device is busy
    (8, 1, 1),  # nothing to share
  )
  def test_few_queries_share_their_choices(self, tiles, blocks, splits):
    with mock.patch.object(compat, 'num_sms', lambda: 132):
      self.assertEqual(forward._pick_splits(tiles, blocks), splits)

  def test_unsupported_kernel_shape_says_why(self):
    *floats, index = draw(TEST['plain'])
    narrow = [jnp.asarray(a, jnp.float32) for a in floats]
    with self.assertRaisesRegex(NotImplementedError, 'dtype float32'):
      sparse_mla(*narrow, index, scale=1.0, impl='gpu')
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in floats]
    with self.assertRaisesRegex(NotImplementedError, 'latent 12 and rope 4'):
      sparse_mla(*narrow, index, scale=1.0, impl='gpu')

  def test_bad_input_names_the_field(self):
    *floats, index = draw(TEST['plain'])
    with self.assertRaisesRegex(ValueError, r'index is \[2, 4, 6\], but'):
      sparse_mla(*floats, index[:, 1:], scale=1.0)
    with self.assertRaisesRegex(ValueError, 'index is float32'):
      sparse_mla(*floats, index.astype(np.float32), scale=1.0)


if __name__ == '__main__':
  absltest.main()
