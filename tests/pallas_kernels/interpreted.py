"""Runs one operation's kernel in the Mosaic interpreter against its reference.

  python tests/pallas_kernels/interpreted.py OP

A process of its own: the interpreter keeps state after a failure. It exits
with an error if a value is off, and prints RACE DETECTED (or raises) on a race.
"""

import functools
import sys
from unittest import mock

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_timing import worst_error
from pallas_kernels import compat, permute
from pallas_kernels.collapse_norm import collapse_norm
from pallas_kernels.collapse_norm import shapes as collapse_shapes
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode import shapes as mla_decode_shapes
from pallas_kernels.mla_prefill import mla_prefill
from pallas_kernels.mla_prefill import shapes as prefill_shapes
from pallas_kernels.permute import shapes as permute_shapes
from pallas_kernels.quantize import (
  ACTIVATION_FLOOR,
  quantize,
  quantize_columns,
)
from pallas_kernels.quantize import shapes as quantize_shapes
from pallas_kernels.router import router
from pallas_kernels.router import shapes as router_shapes
from pallas_kernels.sinkhorn import shapes as sinkhorn_shapes
from pallas_kernels.sinkhorn import sinkhorn
from pallas_kernels.write_streams import shapes as write_shapes
from pallas_kernels.write_streams import write_streams

BF16 = 2.0**-8  # half a step of bfloat16 either side, twice: input and output


def compare(name, op, args, tolerance):
  """op(*args, impl=...) of both kinds; the tolerance is that of worst_error."""
  want = jax.tree.map(np.asarray, op(*args, impl='reference'))
  with compat.interpreted():
    got = jax.tree.map(np.asarray, op(*args, impl='gpu'))
  for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    error = worst_error(g, w)
    print(f'{name}: {w.dtype} error {error:.1e}', flush=True)
    if not error <= tolerance:
      sys.exit(f'{name}: error {error} > {tolerance} of {w.dtype}')


def draw_mla_decode(shape, seed=0):
  """Queries, pages in random order with rubbish in the unused ones."""
  rng = np.random.default_rng(seed)
  B, J = len(shape.lengths), -(-max(shape.lengths) // shape.page)
  pages = B * J + 2
  normal = lambda *size: jnp.asarray(rng.normal(size=size), jnp.bfloat16)
  table = rng.permutation(pages)[: B * J].reshape(B, J)
  return (
    normal(B, shape.new, shape.heads, 512),
    normal(B, shape.new, shape.heads, 64),
    normal(pages, shape.page, 512),
    normal(pages, shape.page, 64),
    jnp.asarray(table, jnp.int32),
    jnp.asarray(shape.lengths, jnp.int32),
  )


def poison(c, table, lengths):
  """c with nan wherever no request has a token."""
  live = np.zeros(c.shape[:2], bool)
  for row, length in zip(np.asarray(table), np.asarray(lengths)):
    at = np.arange(length)
    live[row[at // c.shape[1]], at % c.shape[1]] = True
  return jnp.where(live[..., None], c, jnp.nan)


def check_mla_decode():
  for name, shape in mla_decode_shapes.TEST.items():
    op = functools.partial(mla_decode, scale=0.05, splits=shape.splits or 1)
    # Probabilities and, with splits, partial sums are rounded to bfloat16.
    q_c, q_r, c, *rest = draw_mla_decode(shape)
    args = (q_c, q_r, poison(c, *rest[1:]), *rest)
    compare(name, op, args, 2 * BF16)


def draw_permute(shape, dtype):
  """Plan, x, rows and weights."""
  rng = np.random.default_rng(0)
  size = (shape.tokens, shape.choices)
  experts = rng.integers(0, shape.experts, size)
  experts[rng.random(size) < shape.nowhere] = shape.experts
  plan = permute.plan(jnp.asarray(experts), shape.experts, block=shape.block)
  x = jnp.asarray(rng.normal(size=(shape.tokens, shape.dim)), dtype)
  M = plan.source.shape[0]
  rows = jnp.asarray(rng.normal(size=(M, shape.dim)), dtype)
  return plan, x, rows, jnp.asarray(rng.random(size), jnp.float32)


def check_permute():
  def there(x, grad, plan, impl):
    fn = functools.partial(permute.permute, plan=plan, impl=impl)
    out, pull = jax.vjp(fn, x)
    return out, pull(grad)

  def back(rows, weights, grad, plan, impl):
    fn = functools.partial(permute.combine, plan=plan, impl=impl)
    out, pull = jax.vjp(fn, rows, weights)
    return out, pull(grad)

  for name, shape in permute_shapes.TEST_GPU.items():
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, BF16)):
      plan, x, rows, weights = draw_permute(shape, dtype)
      label = f'{name} {dtype.__name__}'
      compare(label, functools.partial(permute.permute, plan=plan), (x,), 0)
      compare(label, there, (x, rows, plan), tolerance)
      compare(label, back, (rows, weights, x, plan), tolerance)


def draw_grouped_matmul(shape):
  """Rows with two blocks of filler, weights, expert of each block, used."""
  rng = np.random.default_rng(0)
  blocks = [-(-c // shape.block) for c in shape.counts]
  E, used = len(blocks), sum(blocks)
  expert = np.append(np.repeat(np.arange(E), blocks), [E - 1, E - 1])
  rows = np.zeros((len(expert) * shape.block, shape.dim))
  starts = (np.cumsum(blocks) - blocks) * shape.block
  for start, count in zip(starts, shape.counts):
    rows[start : start + count] = rng.normal(size=(count, shape.dim))
  weights = rng.normal(size=(E, shape.dim, shape.out))
  grad = rng.normal(size=(len(rows), shape.out))
  floats = [jnp.asarray(a, jnp.bfloat16) for a in (rows, weights, grad)]
  return *floats, jnp.asarray(expert, jnp.int32), jnp.asarray(used)


def compare_grouped_matmul(name, drawn, **how):
  """Value and gradients, with the weights as they are and turned."""

  def both(rows, weights, grad, expert, used, transpose, impl):
    fn = functools.partial(
      grouped_matmul,
      block_expert=expert,
      used=used,
      transpose=transpose,
      impl=impl,
      **how,
    )
    out, pull = jax.vjp(fn, rows, weights)
    return out, pull(grad)

  rows, weights, *rest = drawn
  for transpose in (False, True):
    w = weights.swapaxes(1, 2) if transpose else weights
    op = functools.partial(both, transpose=transpose)
    compare(f'{name} transpose={transpose}', op, (rows, w, *rest), BF16)


def check_grouped_matmul():
  for name, shape in grouped_shapes.TEST_GPU.items():
    compare_grouped_matmul(name, draw_grouped_matmul(shape))


def check_router():
  for name, shape in router_shapes.TEST.items():
    rng = np.random.default_rng(0)
    # Quarters tie often: the lower number must win.
    draw = rng.normal(size=(shape.tokens, shape.experts)) * 2
    logits = jnp.asarray(np.round(draw * 4) / 4, jnp.float32)
    bias = jnp.asarray(rng.integers(-2, 3, shape.experts) / 2, jnp.float32)
    op = functools.partial(router, top_k=shape.top_k, rule=shape.rule)
    compare(name, op, (logits, bias if shape.bias else None), 1e-6)
  check_router_without_scores()
  check_router_nan()


def check_router_without_scores():
  """A bias of -inf leaves the lower numbers first, none of them twice."""
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 72)), 'float32')
  for groups, top_groups, group_score in ((1, 1, 'max'), (6, 2, 'top2')):
    rule = router_shapes.Rule('sigmoid', groups, top_groups, group_score)
    op = functools.partial(router, top_k=8, rule=rule)
    few = np.full(72, -np.inf, np.float32)
    few[[1, 70]] = 0, 1
    for bias in (few, np.full(72, -np.inf, np.float32)):
      compare(f'{groups} groups, -inf', op, (logits, jnp.asarray(bias)), 1e-6)


def check_router_nan():
  """Tokens with nan get valid experts and weights that show it."""
  draw = np.random.default_rng(0).normal(size=(4, 72)).astype(np.float32)
  draw[1, 5] = np.nan
  draw[2, 70] = -np.nan
  draw[3] = np.nan
  logits = jnp.asarray(draw)
  for scoring in ('softmax', 'sigmoid', 'sqrtsoftplus'):
    for groups, top_groups, group_score in ((1, 1, 'max'), (6, 2, 'top2')):
      rule = router_shapes.Rule(scoring, groups, top_groups, group_score)
      op = functools.partial(router, top_k=8, rule=rule)
      want = jax.tree.map(np.asarray, op(logits, impl='reference'))
      with compat.interpreted():
        got = jax.tree.map(np.asarray, op(logits, impl='gpu'))
      experts, weights, counts = got
      np.testing.assert_array_equal(experts[0], want[0][0])
      np.testing.assert_allclose(weights[0], want[1][0], rtol=1e-6)
      assert all(len(set(row)) == 8 for row in experts.tolist()), experts
      assert experts.min() >= 0 and experts.max() < 72, experts
      assert np.isnan(weights[1:]).all(), weights
      np.testing.assert_array_equal(
        counts, np.bincount(experts.ravel(), minlength=72)
      )
      if scoring != 'softmax':
        np.testing.assert_array_equal(experts[1:3, 0], [5, 70])
      print(f'{scoring}, {groups} groups, nan: valid experts', flush=True)


def check_quantize():
  for name, shape in quantize_shapes.TEST.items():
    for dtype in (jnp.float32, jnp.bfloat16):
      rng = np.random.default_rng(0)
      size = (shape.rows, shape.columns)
      x = rng.normal(size=size) * 10.0 ** rng.integers(-8, 4, (size[0], 1))
      x[-1] = 0
      for floor in (0.0, ACTIVATION_FLOOR):
        op = functools.partial(
          quantize,
          block=shape.block,
          power_of_two=shape.power_of_two,
          floor=floor,
        )
        label = f'{name} {dtype.__name__} floor {floor:g}'
        compare(label, op, (jnp.asarray(x, dtype),), 1e-6)


def check_quantize_columns():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(128, 256)) * 10.0 ** rng.integers(-8, 4, (1, 256))
  x[:, -1] = 0
  for floor in (0.0, ACTIVATION_FLOOR):
    for power_of_two in (True, False):
      op = functools.partial(
        quantize_columns, power_of_two=power_of_two, floor=floor
      )
      for dtype in (jnp.float32, jnp.bfloat16):
        label = f'{dtype.__name__} floor {floor:g}'
        compare(label, op, (jnp.asarray(x, dtype),), 1e-6)
      q, scales = quantize(
        jnp.asarray(x.T.reshape(256, 128)), power_of_two=True
      )
      compare(f'float8 floor {floor:g}', op, (q, scales), 1e-6)


def check_collapse_norm():
  def both(streams, pre, gain, grad, impl):
    op = functools.partial(collapse_norm, impl=impl)
    out, pull = jax.vjp(op, streams, pre, gain)
    return out, pull(grad)

  for name, shape in collapse_shapes.TEST.items():
    rng = np.random.default_rng(0)
    normal = lambda *size, rng=rng: rng.normal(size=size)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, BF16)):
      args = (
        jnp.asarray(normal(*shape), dtype),
        jnp.asarray(normal(*shape[:2]), jnp.float32),
        jnp.asarray(normal(shape.dim), jnp.float32),
        jnp.asarray(normal(shape.tokens, shape.dim), dtype),
      )
      compare(f'{name} {dtype.__name__}', both, args, tolerance)


def check_write_streams():
  def both(streams, y, post, comb, grad, impl):
    op = functools.partial(write_streams, impl=impl)
    out, pull = jax.vjp(op, streams, y, post, comb)
    return out, pull(grad)

  for name, (N, n, D) in write_shapes.TEST.items():
    rng = np.random.default_rng(0)
    normal = lambda *size, rng=rng: rng.normal(size=size)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, BF16)):
      args = (
        jnp.asarray(normal(N, n, D), dtype),
        jnp.asarray(normal(N, D), dtype),
        jnp.asarray(normal(N, n), jnp.float32),
        jnp.asarray(normal(N, n, n), jnp.float32),
        jnp.asarray(normal(N, n, D), dtype),
      )
      compare(f'{name} {dtype.__name__}', both, args, tolerance)


def check_sinkhorn():
  def both(logits, grad, iterations, impl):
    fn = functools.partial(sinkhorn, iterations=iterations, impl=impl)
    out, pull = jax.vjp(fn, logits)
    return out, pull(grad)

  for name, shape in sinkhorn_shapes.TEST.items():
    rng = np.random.default_rng(0)
    size = (shape.tokens, shape.streams, shape.streams)
    logits = jnp.asarray(2 * rng.normal(size=size), jnp.float32)
    grad = jnp.asarray(rng.normal(size=size), jnp.float32)
    op = functools.partial(both, iterations=shape.iterations)
    compare(name, op, (logits, grad), 1e-5)


def check_mla_prefill():
  def both(q, k, v, segments, grad, impl):
    fn = functools.partial(
      mla_prefill, segments=segments, scale=192**-0.5, impl=impl
    )
    out, pull = jax.vjp(fn, q, k, v)
    return out, pull(grad)

  for name, shape in prefill_shapes.TEST_GPU.items():
    rng = np.random.default_rng(0)
    rows = [np.repeat(np.arange(len(s)), s) for s in shape.segments]
    segments = jnp.asarray(np.stack(rows), jnp.int32)
    draw = lambda dim, size=segments.shape, rng=rng, heads=shape.heads: (
      jnp.asarray(rng.normal(size=(*size, heads, dim)), jnp.bfloat16)
    )
    args = (draw(192), draw(192), draw(128), segments, draw(128))
    # With blocks of 64 keys, and of 128 where registers can be moved.
    for moved in (False, True):
      with mock.patch.object(compat, 'REGISTERS_MOVE', moved):
        # Probabilities and their gradients are rounded to bfloat16.
        compare(name, both, args, 2 * BF16)


def check_race():
  """A kernel that reads what a copy has not delivered: must be caught."""

  def body(x, y, tile, here, done):
    plgpu.copy_gmem_to_smem(x, tile, here)
    y[...] = tile[...]
    plgpu.barrier_wait(here)
    del done

  x = jnp.ones((64, 64), jnp.float32)
  with compat.interpreted():
    compat.kernel(
      body,
      jax.ShapeDtypeStruct(x.shape, x.dtype),
      grid={'one': 1},
      scratch=[
        plgpu.SMEM(x.shape, x.dtype),
        plgpu.Barrier(),
        plgpu.Barrier(),
      ],
    )(x)


def check_overwritten():
  """An operand is written while the other warpgroup multiplies: the same."""

  def body(x, y, tile, here):
    w = jax.lax.axis_index('wg')

    @pl.when(w == 0)
    def _():
      plgpu.copy_gmem_to_smem(x, tile, here)

    plgpu.barrier_wait(here)

    @pl.when(w == 0)
    def _():
      def square(acc):
        compat.wgmma(acc, tile, tile)
        return acc[...]

      y[...] = pl.run_scoped(square, plgpu.ACC(x.shape, jnp.float32))

    @pl.when(w == 1)
    def _():
      tile[...] = compat.full(x.shape, 2.0, plgpu.Layout.WGMMA).astype(x.dtype)

  x = jnp.ones((64, 64), jnp.bfloat16)
  with compat.interpreted():
    compat.kernel(
      body,
      jax.ShapeDtypeStruct(x.shape, jnp.float32),
      grid={'one': 1},
      threads=2,
      scratch=[
        plgpu.SMEM(x.shape, x.dtype, transforms=compat.TILED_16BIT),
        plgpu.Barrier(),
      ],
    )(x)


if __name__ == '__main__':
  globals()['check_' + sys.argv[1]]()
