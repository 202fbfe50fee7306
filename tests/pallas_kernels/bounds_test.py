"""Positions, pages, lengths and experts that do not exist are never touched.

What a kernel gets is looked at as well: on a GPU it would read or write there.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import permute
from pallas_kernels.grouped_matmul import fp8 as fp8_gpu
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.grouped_matmul import (
  grouped_matmul,
  grouped_matmul_fp8,
  grouped_swiglu,
)
from pallas_kernels.grouped_matmul import swiglu as swiglu_gpu
from pallas_kernels.index_candidates import gpu as candidates_gpu
from pallas_kernels.index_candidates import index_candidates
from pallas_kernels.indexer import gpu as indexer_gpu
from pallas_kernels.indexer import indexer
from pallas_kernels.mla_decode import gpu as decode_gpu
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.permute import gpu as permute_gpu
from pallas_kernels.sparse_mla import gpu as sparse_gpu
from pallas_kernels.sparse_mla import sparse_mla


def normal(*size):
  rng = np.random.default_rng(sum(size))
  return jnp.asarray(rng.normal(size=size), jnp.float32)


@contextlib.contextmanager
def caught(module, name):
  """Collects what would be given to a kernel."""
  given = []

  def take(*args):
    given.extend(args)
    raise NotImplementedError('seen')

  with mock.patch.object(module, name, take):
    yield given


def given_to(module, name, op, *args):
  with caught(module, name) as given, contextlib.suppress(NotImplementedError):
    op(*args, impl='gpu')
  return given


class BoundsTest(parameterized.TestCase):
  @parameterized.parameters(5000, 131, 2**31 - 1)
  def test_a_window_that_begins_behind_the_keys_is_empty(self, first):
    q, k, w = normal(2, 3, 8, 16), normal(2, 130, 16), normal(2, 3, 8)
    firsts = jnp.full((2, 3), first, jnp.int32).at[0, 0].set(-7)
    lasts = jnp.full((2, 3), first, jnp.int32).at[1, 1].set(-(2**31))
    op = functools.partial(indexer, top_k=4)
    got = op(q, k, w, firsts, lasts)
    self.assertTrue((got[0, 0] >= 0).all())
    self.assertEqual(np.unique(got[0, 1:]).tolist(), [-1])
    _, _, _, low, high, *_ = given_to(
      indexer_gpu, 'indexer', op, q, k, w, firsts, lasts
    )
    for a in (low, high):
      self.assertBetween(int(a.min()), 0, 130)
      self.assertBetween(int(a.max()), 0, 130)

  @parameterized.parameters(130, 5000, -7, 2**31 - 1, -(2**31))
  def test_a_block_that_begins_at_no_key_is_none(self, wild):
    q, k, w = normal(2, 3, 8, 16), normal(2, 130, 16), normal(2, 3, 8)
    starts = jnp.full((2, 3, 3), wild, jnp.int32).at[..., 1].set(128)
    lasts = jnp.full((2, 3), 2**31 - 1, jnp.int32).at[1, 1].set(-(2**31))
    op = functools.partial(index_candidates, size=16, top_k=4)
    got = op(q, k, w, starts, lasts)
    np.testing.assert_array_equal(got[0], [[128, 129, -1, -1]] * 3)
    np.testing.assert_array_equal(got[1, 1], -1)
    given = given_to(
      candidates_gpu, 'index_candidates', op, q, k, w, starts, lasts
    )
    np.testing.assert_array_equal(given[3], [[[-1, 128, -1]] * 3] * 2)
    self.assertBetween(int(given[4].min()), 0, 130)
    self.assertBetween(int(given[4].max()), 0, 130)
    # And what its copies read lies within the keys of a row.
    flat = (a.reshape(6, -1) for a in given[3:5])
    starts, lasts = next(flat), next(flat)[:, 0]
    for size in (16, 64, 128):
      run = min(size, 64)
      first, low, high = candidates_gpu._runs(starts, lasts, size, run, 130)
      self.assertBetween(int(first.min()), 0, 130 - run)
      self.assertBetween(int(first.max()), 0, 130 - run)
      self.assertEqual(int(jnp.maximum(high - low, 0)[:4].sum(axis=1)[0]), 2)

  def test_a_position_behind_a_row_is_not_one_of_the_next_row(self):
    q_c, q_r = normal(2, 3, 4, 8), normal(2, 3, 4, 2)
    c, k_r = normal(2, 9, 8), normal(2, 9, 2)
    index = jnp.asarray([[[0, 4, 9, 2**30], [9, 17, 18, -3], [1, 8, -1, 2]]])
    index = jnp.concatenate([index, index])
    op = functools.partial(sparse_mla, scale=0.5)
    clean = jnp.where(index < 9, index, -1)
    wanted = jax.grad(lambda *a: (op(*a, clean) ** 2).sum(), range(4))
    got = jax.grad(lambda *a: (op(*a, index) ** 2).sum(), range(4))
    args = q_c, q_r, c, k_r
    np.testing.assert_array_equal(op(*args, index), op(*args, clean))
    np.testing.assert_array_equal(op(*args, index)[:, 1], 0)
    for a, b in zip(got(*args), wanted(*args)):
      np.testing.assert_array_equal(a, b)
    _, _, (keys,), *_ = given_to(sparse_gpu, 'sparse_mla', op, *args, index)
    self.assertLess(int(keys.index.max()), 9)
    # Unsigned and narrow positions, too.
    small = jnp.asarray(np.where(clean < 0, 200, clean), jnp.uint8)
    np.testing.assert_array_equal(op(*args, small), op(*args, clean))

  def test_no_more_tokens_are_read_than_pages_hold(self):
    q_c, q_r = normal(3, 2, 4, 8), normal(3, 2, 4, 2)
    c, k_r = normal(5, 4, 8), normal(5, 4, 2)
    table = jnp.asarray([[3, 0], [1, 7], [4, -2]], jnp.int32)
    op = functools.partial(mla_decode, scale=0.5)
    args = q_c, q_r, c, k_r, table
    lengths = jnp.asarray([100, 4, -5], jnp.int32)
    got = op(*args, lengths)
    np.testing.assert_array_equal(
      got, op(*args, jnp.asarray([8, 4, 0], jnp.int32))
    )
    self.assertFalse(got[2].any())
    given = given_to(decode_gpu, 'mla_decode', op, *args, lengths)
    self.assertBetween(int(given[4].min()), 0, 4)
    self.assertBetween(int(given[4].max()), 0, 4)
    self.assertEqual(given[5].tolist(), [8, 4, 0])

  def test_a_plan_made_by_hand_writes_nowhere_else(self):
    plan = permute.plan(jnp.asarray([[0, 1], [1, 2], [2, 0]]), 3, block=2)
    M = plan.source.shape[0]
    wild = plan._replace(
      slot=plan.slot.at[0, 0].set(-1).at[2, 1].set(M + 9),
      source=plan.source.at[plan.slot[0, 0]].set(-4),
    )
    nowhere = plan._replace(
      slot=plan.slot.at[0, 0].set(M).at[2, 1].set(M),
      source=plan.source.at[plan.slot[0, 0]].set(6),
    )
    x, rows, weights = normal(3, 4), normal(M, 4), normal(3, 2)
    for op, args in (
      (permute.permute, (x,)),
      (permute.combine, (rows, weights)),
      (permute.permute_fp8, (normal(3, 128),)),
    ):
      got, want = op(*args, wild), op(*args, nowhere)
      jax.tree.map(np.testing.assert_array_equal, got, want)
      name = op.__name__
      given = given_to(permute_gpu, name, op, *args, wild)
      seen = next(a for a in given if isinstance(a, permute.Plan))
      self.assertBetween(int(seen.slot.min()), 0, M)
      self.assertBetween(int(seen.slot.max()), 0, M)
      self.assertBetween(int(seen.source.min()), 0, 6)

  @parameterized.parameters(99, -3)
  def test_blocks_of_experts_that_do_not_exist(self, wild):
    rows, weights = normal(8, 128), normal(3, 128, 128)
    expert = jnp.asarray([0, 1, 2, wild], jnp.int32)
    near = jnp.clip(expert, 0, 2)
    for used in (None, 2, 4, 50, -1):
      # More blocks than there are: the loop over runs has to end.
      op = functools.partial(grouped_matmul, used=used)
      jitted = jax.jit(op)
      np.testing.assert_array_equal(
        jitted(rows, weights, expert), jitted(rows, weights, near)
      )
      given = given_to(grouped_gpu, 'forward', op, rows, weights, expert)
      self.assertBetween(int(given[2].max()), 0, 2)
      self.assertBetween(int(given[2].min()), 0, 2)
      self.assertBetween(int(given[3]), 0, 4)
      loss = lambda w, e, op=op: (op(rows, w, e) ** 2).sum()
      np.testing.assert_array_equal(
        jax.grad(loss)(weights, expert), jax.grad(loss)(weights, near)
      )
    given = given_to(
      swiglu_gpu, 'forward', grouped_swiglu, rows, weights, expert
    )
    self.assertBetween(int(given[2].max()), 0, 2)
    half = lambda a: a.astype(jnp.float8_e4m3fn)
    scales = jnp.ones((8, 1)), jnp.ones((3, 1, 1))
    args = half(rows), scales[0], half(weights), scales[1], expert
    given = given_to(fp8_gpu, 'forward', grouped_matmul_fp8, *args)
    self.assertBetween(int(given[4].max()), 0, 2)


if __name__ == '__main__':
  absltest.main()
