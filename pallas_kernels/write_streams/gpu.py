"""Residual streams mixed on Hopper: a token per warpgroup, 512 numbers a step.

Scalars of the token lie in registers of all threads; the backward kernel adds
up its products of streams thread by thread, and across threads once at the end.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

STEP = 512
MOST = 4  # streams; more don't fit registers
_LAYOUT = plgpu.Layout.WG_STRIDED((STEP,), vec_size=4)


def write_streams(
  streams: jax.Array, y: jax.Array, post: jax.Array, comb: jax.Array
) -> jax.Array:
  """Returns the new streams [N n D].

  Raises:
    NotImplementedError: a size or dtype that the kernel can't take.
  """
  _check(streams)
  return compat.kernel(
    _forward_body,
    jax.ShapeDtypeStruct(streams.shape, streams.dtype),
    grid={'token': streams.shape[0]},
  )(streams, y, post, comb)


def write_streams_bwd(
  streams: jax.Array,
  y: jax.Array,
  post: jax.Array,
  comb: jax.Array,
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of streams, y, post and comb.

  Raises:
    NotImplementedError: a size or dtype that the kernel can't take.
  """
  _check(streams)
  like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
  return compat.kernel(
    _backward_body,
    (like(streams), like(y), like(post), like(comb)),
    grid={'token': streams.shape[0]},
  )(streams, y, post, comb, grad)


def _check(streams: jax.Array) -> None:
  """Raises NotImplementedError for a size or dtype it can't take."""
  _, n, D = streams.shape
  if n > MOST or D % STEP:
    raise NotImplementedError(
      f'{n} streams of width {D}, not up to {MOST} of {STEP} * n'
    )
  if streams.dtype not in (jnp.bfloat16, jnp.float32):
    raise NotImplementedError(f'dtype {streams.dtype}, not bfloat16 or float32')


def _part(ref: jax.Ref, at: tuple, i: jax.Array) -> jax.Array:
  """Loads step i of a row as float32."""
  where = (*at, pl.ds(i * STEP, STEP))
  return compat.load(ref, where, _LAYOUT, optimized=False).astype(jnp.float32)


def _forward_body(
  streams: jax.Ref, y: jax.Ref, post: jax.Ref, comb: jax.Ref, out: jax.Ref
) -> None:
  """Computes one token."""
  token = lax.axis_index('token')
  n = streams.shape[1]
  post = [post[token, k] for k in range(n)]
  comb = [[comb[token, j, k] for k in range(n)] for j in range(n)]

  def one(i: jax.Array, _) -> tuple:
    rows = [_part(streams, (token, j), i) for j in range(n)]
    given = _part(y, (token,), i)
    for k in range(n):
      new = post[k] * given
      for j in range(n):
        new += comb[j][k] * rows[j]
      out[token, k, pl.ds(i * STEP, STEP)] = new.astype(out.dtype)
    return ()

  lax.fori_loop(0, streams.shape[2] // STEP, one, ())


def _backward_body(
  streams: jax.Ref, y: jax.Ref, post: jax.Ref, comb: jax.Ref, grad: jax.Ref,
  dstreams: jax.Ref, dy: jax.Ref, dpost: jax.Ref, dcomb: jax.Ref,
) -> None:  # fmt: skip
  """Computes the gradients of one token."""
  token = lax.axis_index('token')
  n = streams.shape[1]
  post = [post[token, k] for k in range(n)]
  comb = [[comb[token, j, k] for k in range(n)] for j in range(n)]

  def one(i: jax.Array, sums: tuple) -> tuple:
    here = pl.ds(i * STEP, STEP)
    grads = [_part(grad, (token, k), i) for k in range(n)]
    # Output: its gradient, and the products of its weights.
    given = _part(y, (token,), i)
    total = functools.reduce(
      lambda a, b: a + b, [w * g for w, g in zip(post, grads)]
    )
    dy[token, here] = total.astype(dy.dtype)
    out = [s + given * g for s, g in zip(sums, grads)]
    # Streams: the same for each, with a product for each pair.
    for j in range(n):
      row = _part(streams, (token, j), i)
      total = functools.reduce(
        lambda a, b: a + b, [w * g for w, g in zip(comb[j], grads)]
      )
      dstreams[token, j, here] = total.astype(dstreams.dtype)
      own = sums[(j + 1) * n : (j + 2) * n]
      out += [s + row * g for s, g in zip(own, grads)]
    return tuple(out)

  zeros = compat.full((STEP,), 0.0, _LAYOUT)
  start = (zeros,) * (n + n * n)
  sums = lax.fori_loop(0, streams.shape[2] // STEP, one, start)
  for k in range(n):
    dpost[token, k] = sums[k].sum()
    for j in range(n):
      dcomb[token, j, k] = sums[(j + 1) * n + k].sum()
