"""Attention over gathered latents on a GPU, forward and backward, in Triton.

A gather of rows is what Mosaic's copies can't do on Hopper (its TMA fetches
boxes), and what Triton's loads do as they are. One program is 64 heads of one
query, walking its latents 64 (forward) or 32 (backward) at a time.

The gradient of the latents has no atomic: a program per query and block of
chosen latents stores that query's part of each, a chunk of queries at a time
so that the parts never take more than half a GiB, and each latent then adds its
parts in order of the queries, found by a stable sort of the positions.
Legend: N queries of all rows, H heads (padded), K chosen (padded).
"""

import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

HEADS, LATENT, ROPE = 64, 512, 64
BLOCK = 64  # chosen latents, to which K is padded
_PARTS = 2**28  # most numbers in the stored parts of a chunk of queries
_LOG2E = math.log2(math.e)
_EMPTY = -1e30  # running maximum of a head that has seen no key yet


def sparse_mla(q_c, q_r, c, k_r, index, scale):
  if any(a.dtype != jnp.bfloat16 for a in (q_c, q_r, c, k_r)):
    raise NotImplementedError(f'dtype {q_c.dtype}/{c.dtype}, not bfloat16')
  if (q_c.shape[-1], q_r.shape[-1]) != (LATENT, ROPE):
    raise NotImplementedError(
      f'latent {q_c.shape[-1]} and rope {q_r.shape[-1]}, not 512 and 64'
    )
  B, T, H, _ = q_c.shape
  S, K = c.shape[1], index.shape[-1]
  pad_heads, pad_index = -H % HEADS, -K % BLOCK
  flat = lambda q: jnp.pad(
    q.reshape(B * T, H, -1), ((0, 0), (0, pad_heads), (0, 0))
  )
  row = jnp.arange(B, dtype=jnp.int32)[:, None, None] * S
  at = jnp.where(index >= 0, index.astype(jnp.int32) + row, -1)
  at = jnp.pad(
    at.reshape(B * T, K), ((0, 0), (0, pad_index)), constant_values=-1
  )
  latents = c.reshape(B * S, LATENT), k_r.reshape(B * S, ROPE)
  out = _attend(flat(q_c), flat(q_r), *latents, at, scale)
  return out[:, :H].reshape(B, T, H, LATENT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_c, q_r, c, k_r, at, scale):
  return _forward(q_c, q_r, c, k_r, at, scale)[0]


def _fwd(q_c, q_r, c, k_r, at, scale):
  out, lse = _forward(q_c, q_r, c, k_r, at, scale)
  return out, (q_c, q_r, c, k_r, at, out, lse)


def _bwd(scale, saved, grad):
  q_c, q_r, c, k_r, at, out, lse = saved
  grad = grad.astype(jnp.bfloat16)
  product = grad.astype(jnp.float32) * out.astype(jnp.float32)
  delta = product.sum(-1)  # [N H]
  queries = (q_c, q_r, grad, lse, delta, at)
  dq_c, dq_r = _queries(*queries, c, k_r, scale)
  dc, dk_r = _latents(queries, c, k_r, scale)
  return dq_c, dq_r, dc.astype(c.dtype), dk_r.astype(k_r.dtype), None


_attend.defvjp(_fwd, _bwd)


def _dot(a, b, contract):
  return lax.dot_general(
    a, b, (contract, ((), ())), preferred_element_type=jnp.float32
  )


def _gather(c, k_r, at):
  """Rows `at` of both, zeros where it is negative."""
  here = (at >= 0)[:, None]
  rows = jnp.maximum(at, 0)[:, None]
  read = lambda ref: compat.triton_load(
    ref.at[rows, jnp.arange(ref.shape[1])[None]], mask=here, other=0
  )
  return read(c), read(k_r)


def _steps(at, size):
  """[N] int32: blocks of each query up to its last choice."""
  place = jnp.arange(1, at.shape[1] + 1, dtype=jnp.int32)
  last = jnp.where(at >= 0, place, 0).max(axis=1)
  return -(-last // size)


def _forward(q_c, q_r, c, k_r, at, scale):
  """Output [N H C] and base-2 log-sum-exp [N H] of the scaled scores."""
  N, H, _ = q_c.shape
  return compat.triton_kernel(
    functools.partial(_forward_body, scale=scale * _LOG2E),
    (
      jax.ShapeDtypeStruct(q_c.shape, q_c.dtype),
      jax.ShapeDtypeStruct((N, H), jnp.float32),
    ),
    grid=(N, H // HEADS),
    warps=8,
    stages=2,
  )(q_c, q_r, c, k_r, at, _steps(at, BLOCK))


def _own(refs):
  """What this program's 64 heads of one query have in each ref."""
  n, heads = pl.program_id(0), pl.ds(pl.program_id(1) * HEADS, HEADS)
  return [ref[n, heads] for ref in refs]


def _forward_body(q_c, q_r, c, k_r, at, steps, out, lse, *, scale):
  n, heads = pl.program_id(0), pl.ds(pl.program_id(1) * HEADS, HEADS)
  qc, qr = _own((q_c, q_r))

  def step(i, carry):
    acc, top, total = carry
    rows = at[n, pl.ds(i * BLOCK, BLOCK)]
    key, shared = _gather(c, k_r, rows)
    s = _dot(qc, key, ((1,), (1,))) + _dot(qr, shared, ((1,), (1,)))
    s = jnp.where((rows >= 0)[None], s * scale, -jnp.inf)
    new_top = jnp.maximum(top, s.max(axis=1))
    p = jnp.exp2(s - new_top[:, None])
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(axis=1)
    acc = acc * shrink[:, None] + _dot(p.astype(c.dtype), key, ((1,), (0,)))
    return acc, new_top, total

  acc, top, total = lax.fori_loop(
    0,
    steps[n],
    step,
    (
      jnp.zeros((HEADS, LATENT), jnp.float32),
      jnp.full((HEADS,), _EMPTY, jnp.float32),
      jnp.zeros((HEADS,), jnp.float32),
    ),
  )
  safe = jnp.where(total > 0, total, 1.0)
  out[n, heads] = (acc / safe[:, None]).astype(out.dtype)
  lse[n, heads] = top + jnp.log2(safe)


def _queries(q_c, q_r, grad, lse, delta, at, c, k_r, scale):
  """Gradients of the queries."""
  N, H, _ = q_c.shape
  size = BLOCK // 2
  return compat.triton_kernel(
    functools.partial(_queries_body, scale=scale, size=size),
    (
      jax.ShapeDtypeStruct(q_c.shape, q_c.dtype),
      jax.ShapeDtypeStruct(q_r.shape, q_r.dtype),
    ),
    grid=(N, H // HEADS),
    warps=8,
    stages=1,
  )(q_c, q_r, grad, lse, delta, at, _steps(at, size), c, k_r)


def _queries_body(
  q_c, q_r, grad, lse, delta, at, steps, c, k_r, dq_c, dq_r, *, scale, size
):
  n, heads = pl.program_id(0), pl.ds(pl.program_id(1) * HEADS, HEADS)
  qc, qr, g, norm, shift = _own((q_c, q_r, grad, lse, delta))

  def step(i, carry):
    acc_c, acc_r = carry
    rows = at[n, pl.ds(i * size, size)]
    key, shared = _gather(c, k_r, rows)
    s = _dot(qc, key, ((1,), (1,))) + _dot(qr, shared, ((1,), (1,)))
    s = jnp.where((rows >= 0)[None], s * (scale * _LOG2E), -jnp.inf)
    p = jnp.exp2(s - norm[:, None])
    dp = _dot(g, key, ((1,), (1,)))
    ds = (p * (dp - shift[:, None]) * scale).astype(c.dtype)
    acc_c += _dot(ds, key, ((1,), (0,)))
    acc_r += _dot(ds, shared, ((1,), (0,)))
    return acc_c, acc_r

  acc_c, acc_r = lax.fori_loop(
    0,
    steps[n],
    step,
    (
      jnp.zeros((HEADS, LATENT), jnp.float32),
      jnp.zeros((HEADS, ROPE), jnp.float32),
    ),
  )
  dq_c[n, heads] = acc_c.astype(dq_c.dtype)
  dq_r[n, heads] = acc_r.astype(dq_r.dtype)


def _latents(queries, c, k_r, scale):
  """Gradients of c and k_r in float32, chunk by chunk of the queries."""
  at = queries[-1]
  N, K = at.shape
  size = max(1, min(N, _PARTS // (K * (LATENT + ROPE))))
  chunks = -(-N // size)
  wide = lambda a: jnp.pad(
    a, ((0, chunks * size - N),) + ((0, 0),) * (a.ndim - 1)
  )
  # Queries that are none choose nothing.
  padded = [wide(a) for a in queries[:-1]]
  padded.append(
    jnp.pad(at, ((0, chunks * size - N), (0, 0)), constant_values=-1)
  )
  cut = [a.reshape(chunks, size, *a.shape[1:]) for a in padded]

  def chunk(total, own):
    parts = _parts(*own, c, k_r, scale)
    order, starts = _lists(own[-1].reshape(-1), c.shape[0])
    return [_add_parts(t, p, order, starts) for t, p in zip(total, parts)], None

  zero = [jnp.zeros(a.shape, jnp.float32) for a in (c, k_r)]
  return lax.scan(chunk, zero, tuple(cut))[0]


def _lists(at, latents):
  """at [M] -> order [M], starts [latents + 1] of the choices of each latent."""
  order = jnp.argsort(at, stable=True).astype(jnp.int32)
  bounds = jnp.arange(latents + 1, dtype=at.dtype)
  return order, jnp.searchsorted(at[order], bounds).astype(jnp.int32)


def _parts(q_c, q_r, grad, lse, delta, at, c, k_r, scale):
  """What each query adds to the gradients of its choices: [N*K C], [N*K R]."""
  N, K = at.shape
  return compat.triton_kernel(
    functools.partial(_parts_body, scale=scale),
    (
      jax.ShapeDtypeStruct((N * K, LATENT), c.dtype),
      jax.ShapeDtypeStruct((N * K, ROPE), c.dtype),
    ),
    grid=(N, K // BLOCK),
    warps=8,
    stages=1,
  )(q_c, q_r, grad, lse, delta, at, c, k_r)


def _parts_body(q_c, q_r, grad, lse, delta, at, c, k_r, dc, dk_r, *, scale):
  n, block = pl.program_id(0), pl.program_id(1)
  rows = at[n, pl.ds(block * BLOCK, BLOCK)]
  key, shared = _gather(c, k_r, rows)
  size = HEADS // 2

  def step(i, carry):
    acc_c, acc_r = carry
    heads = pl.ds(i * size, size)
    qc, qr, g = q_c[n, heads], q_r[n, heads], grad[n, heads]
    s = _dot(key, qc, ((1,), (1,))) + _dot(shared, qr, ((1,), (1,)))
    s = jnp.where((rows >= 0)[:, None], s * (scale * _LOG2E), -jnp.inf)
    p = jnp.exp2(s - lse[n, heads][None])
    dp = _dot(key, g, ((1,), (1,)))
    ds = (p * (dp - delta[n, heads][None]) * scale).astype(c.dtype)
    acc_c += _dot(ds, qc, ((1,), (0,)))
    acc_c += _dot(p.astype(c.dtype), g, ((1,), (0,)))
    acc_r += _dot(ds, qr, ((1,), (0,)))
    return acc_c, acc_r

  acc_c, acc_r = lax.fori_loop(
    0,
    q_c.shape[1] // size,
    step,
    (
      jnp.zeros((BLOCK, LATENT), jnp.float32),
      jnp.zeros((BLOCK, ROPE), jnp.float32),
    ),
  )
  where = pl.ds((n * (at.shape[1] // BLOCK) + block) * BLOCK, BLOCK)
  dc[where] = acc_c.astype(dc.dtype)
  dk_r[where] = acc_r.astype(dk_r.dtype)


def _add_parts(total, parts, order, starts):
  """total[s] + sum of parts[order[starts[s]:starts[s + 1]]], in that order."""
  return compat.triton_kernel(
    _add_body,
    jax.ShapeDtypeStruct(total.shape, jnp.float32),
    grid=(total.shape[0],),
    warps=4,
    stages=2,
  )(total, parts, order, starts)


def _add_body(total, parts, order, starts, out, size=8):
  s = pl.program_id(0)
  first, last = starts[s], starts[s + 1]

  def step(i, acc):
    place = first + i * size + jnp.arange(size)
    here = place < last
    row = compat.triton_load(
      order.at[jnp.minimum(place, order.shape[0] - 1)], mask=here, other=0
    )
    part = compat.triton_load(
      parts.at[row[:, None], jnp.arange(parts.shape[1])[None]],
      mask=here[:, None],
      other=0,
    )
    return acc + part.astype(jnp.float32).sum(axis=0)

  steps = (last - first + size - 1) // size
  out[s] = lax.fori_loop(0, steps, step, total[s])
