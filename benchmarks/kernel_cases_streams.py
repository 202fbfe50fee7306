"""Like kernel_cases, for the residual streams of hyper-connections."""

import functools

import jax

from benchmarks.kernel_work import Work, bf16, fresh_keys, nbytes
from pallas_kernels.collapse_norm import collapse_norm
from pallas_kernels.collapse_norm import shapes as collapse_shapes
from pallas_kernels.write_streams import shapes as write_shapes
from pallas_kernels.write_streams import write_streams


def _streams(shape):
  k = fresh_keys(3)
  pre = jax.random.uniform(k[1], (shape.tokens, shape.streams))
  return bf16(k[0], *shape), pre, 1 + jax.random.normal(k[2], shape[2:]) / 8


def collapse(shape):
  args = _streams(shape)
  xla = functools.partial(collapse_norm, impl='reference')
  moved = nbytes(args[0]) * (1 + 1 / shape.streams)
  return Work(collapse_norm, args, xla, 0, moved, {'xla': xla})


def collapse_bwd(shape):
  grad = bf16(fresh_keys(4)[3], shape.tokens, shape.dim)

  def op(*args, impl):
    fn = functools.partial(collapse_norm, impl=impl)
    return jax.vjp(fn, *args[:3])[1](args[3])

  args = *_streams(shape), grad
  xla = functools.partial(op, impl='reference')
  moved = nbytes(args[0]) * (2 + 1 / shape.streams)
  return Work(op, args, xla, 0, moved, {'xla': xla})


def _written(shape):
  k = fresh_keys(4)
  N, n, D = shape
  weights = (jax.random.uniform(k[i], (N, *(n,) * i)) for i in (1, 2))
  return bf16(k[0], N, n, D), bf16(k[3], N, D), *weights


def write(shape):
  args = _written(shape)
  xla = functools.partial(write_streams, impl='reference')
  moved = nbytes(args[0]) * (2 + 1 / shape.streams)
  return Work(write_streams, args, xla, 0, moved, {'xla': xla})


def write_bwd(shape):
  grad = bf16(fresh_keys(5)[4], *shape)

  def op(*args, impl):
    fn = functools.partial(write_streams, impl=impl)
    return jax.vjp(fn, *args[:4])[1](args[4])

  args = *_written(shape), grad
  xla = functools.partial(op, impl='reference')
  moved = nbytes(args[0]) * (3 + 2 / shape.streams)
  return Work(op, args, xla, 0, moved, {'xla': xla})


_small = lambda s: s._replace(tokens=150, dim=1024)
OPS = {
  'collapse_norm': (collapse_shapes.BENCH, collapse, _small),
  'collapse_norm_bwd': (collapse_shapes.BENCH, collapse_bwd, _small),
  'write_streams': (write_shapes.BENCH, write, _small),
  'write_streams_bwd': (write_shapes.BENCH, write_bwd, _small),
}
