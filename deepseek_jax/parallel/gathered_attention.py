"""Causal attention of a device's queries to the gathered tokens of all.

Keys and values are made of what is gathered for a block of tokens at a time.
Of latent attention that is C + R numbers a token for all heads together, where
keys and values would be H (N + R + V): 576 against 57,344 in DeepSeek-V3
(arXiv:2405.04434, section 2.1.2). Of grouped queries it is the 2 G K of keys
and values themselves. A ring would send as much, and twice that in the backward
pass, where gradients travel along with keys; all that it saves is room for the
G heads of one layer, so they are gathered as well.
Blocks that lie ahead of all queries are skipped, so the last device has the
most to do; to even that out tokens would have to change places before the
embedding and back before prediction. The backward pass gathers nothing: it
keeps what was gathered, recomputes the scores, and scatters the gradients of
what was gathered, as small as it is.
Legend: B batch, T queries of a device, S keys of a block, H heads, G key heads,
C latent, N no-rope dim, R rope dim, V value dim, K key dim (N + R of latents).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.parallel import products, sharding
from deepseek_jax.parallel.masking import MASKED
from deepseek_jax.parallel.sequence import Along

_BLOCK = 1024  # keys expanded at a time, at most


class Sequence(NamedTuple):
  """Describes which keys each query attends to."""

  first: jax.Array  # int32, index of the first query in its row
  queries: jax.Array | None  # [B T] int32 documents, or None for one
  keys: jax.Array | None  # [B all] int32


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns an einsum accumulated in float32."""
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def expand_latents(
  shape: tuple[int, int], latents: tuple[jax.Array, jax.Array], up: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the keys [B S H K] and values [B S H V] of latents.

  Args:
    shape: (H, K).
    latents: c [B S C] and rotary keys [B S R].
    up: [C H N+V].
  """
  c, kr = latents
  kv = products.einsum('BSC,CHK->BSHK', c, up)
  kv = sharding.shard(kv, 'batch', 'seq', 'heads', None)
  kn, v = jnp.split(kv, [shape[1] - kr.shape[-1]], axis=-1)
  # All heads share the rotary key.
  kr = jnp.broadcast_to(kr[:, :, None], (*kn.shape[:3], kr.shape[-1]))
  return jnp.concatenate([kn, kr], axis=-1), v


def repeat_groups(
  shape: tuple[int, int],
  keys_values: tuple[jax.Array, jax.Array],
  _: tuple = (),
) -> tuple[jax.Array, ...]:
  """Repeats keys [B S G K] and values [B S G V] for the H heads of (H, K)."""
  H = shape[0]
  return tuple(jnp.repeat(a, H // a.shape[2], axis=2) for a in keys_values)


def _blocks(x: jax.Array | None, size: int) -> jax.Array | None:
  """Returns [B all ...] as [blocks B size ...]; None stays."""
  if x is None:
    return None
  B, length = x.shape[:2]
  return jnp.moveaxis(x.reshape(B, length // size, size, *x.shape[2:]), 1, 0)


def _mask(
  seen: Sequence,
  start: jax.Array,
  documents: jax.Array | None,
  length: int,
  size: int,
) -> jax.Array:
  """Returns [B 1 T S] bool: the keys from `start` on that queries attend to."""
  query = seen.first + jnp.arange(length)
  mask = (query[:, None] >= start + jnp.arange(size))[None, None]
  if documents is None:
    return mask
  return mask & (seen.queries[:, None, :, None] == documents[:, None, None])


def _walk(
  body: Callable,
  carry: Any,
  skipped: Callable,
  seen: Sequence,
  parts: Any,
  length: int,
) -> tuple[Any, Any]:
  """Scans `body` over blocks of tokens, past those ahead of all queries."""
  most = min(length, _BLOCK)
  size = next(s for s in range(most, 0, -1) if length % s == 0)
  parts = jax.tree.map(lambda x: _blocks(x, size), parts)
  starts = jnp.arange(jax.tree.leaves(parts)[0].shape[0]) * size

  def one(carry: Any, block: tuple) -> tuple[Any, Any]:
    start, part, documents = block
    mask = _mask(seen, start, documents, length, size)
    near = lambda carry: body(carry, part, mask)
    far = lambda carry: (carry, skipped(part))
    return jax.lax.cond(start < seen.first + length, near, far, carry)

  return jax.lax.scan(one, carry, (starts, parts, _blocks(seen.keys, size)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def attend(
  expand: Callable,
  q: jax.Array,
  parts: Any,
  weights: Any,
  seen: Sequence,
  scale: float,
) -> jax.Array:
  """Computes attention of local queries to all tokens; first derivatives only.

  Args:
    expand: ((H, K), parts of a block, weights) -> keys [B S H K], values
      [B S H V].
    q: [B T H K].
    parts: tree of [B all ...], of all tokens.
    weights: tree of arrays.
    seen: which keys each query attends to.
    scale: multiplies the scores.

  Returns:
    [B T H V] in the dtype of q.
  """
  return _attend_fwd(expand, q, parts, weights, seen, scale)[0]


def _attend_fwd(
  expand: Callable,
  q: jax.Array,
  parts: Any,
  weights: Any,
  seen: Sequence,
  scale: float,
) -> tuple[jax.Array, tuple]:
  """Computes `attend`; keeps inputs, out and log-sum-exp [B H T] float32."""
  B, T, H, _ = q.shape
  value = jax.eval_shape(
    functools.partial(expand, q.shape[2:]), parts, weights
  )[1]

  def body(carry: tuple, part: Any, mask: jax.Array) -> tuple[tuple, None]:
    out, top, total = carry
    k, v = expand(q.shape[2:], part, weights)
    # Online softmax in float32: the sums so far shrink as the maximum grows.
    scores = jnp.where(mask, _dot('BTHK,BSHK->BHTS', q, k) * scale, MASKED)
    new = jnp.maximum(top, scores.max(axis=-1))
    p, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
    more = _dot('BHTS,BSHV->BHTV', p.astype(v.dtype), v)
    out = out * old[..., None] + more
    return (out, new, total * old + p.sum(axis=-1)), None

  f32 = functools.partial(jnp.full, dtype=jnp.float32)
  # Numerators [B H T V], maxima and denominators [B H T] so far.
  start = (
    f32((B, H, T, value.shape[-1]), 0),
    f32((B, H, T), MASKED),
    f32((B, H, T), 0),
  )
  skipped = lambda part: None
  (out, top, total), _ = _walk(body, start, skipped, seen, parts, T)
  out = (out / total[..., None]).astype(q.dtype).transpose(0, 2, 1, 3)
  return out, (q, parts, weights, seen, out, top + jnp.log(total))


def _attend_bwd(
  expand: Callable, scale: float, saved: tuple, grad: jax.Array
) -> tuple:
  """Returns gradients of q, parts and weights; recomputes keys and scores."""
  q, parts, weights, seen, out, normalizer = saved
  # The row sums of p * dp (FlashAttention-2, arXiv:2307.08691, section 3.1).
  delta = _dot('BTHV,BTHV->BHT', grad, out)

  def body(carry: tuple, part: Any, mask: jax.Array) -> tuple[tuple, Any]:
    dq, dweights = carry
    # Keys, values and probabilities of the block are recomputed.
    (k, v), pull = jax.vjp(
      functools.partial(expand, q.shape[2:]), part, weights
    )
    p = jnp.exp(_dot('BTHK,BSHK->BHTS', q, k) * scale - normalizer[..., None])
    p = jnp.where(mask, p, 0.0)
    dv = _dot('BHTS,BTHV->BSHV', p.astype(grad.dtype), grad)
    dp = _dot('BTHV,BSHV->BHTS', grad, v)
    ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
    dk = _dot('BHTS,BTHK->BSHK', ds, q)
    dpart, more = pull((dk.astype(k.dtype), dv.astype(v.dtype)))
    dq += _dot('BHTS,BSHK->BTHK', ds, k)
    wide = lambda a, b: a + b.astype(jnp.float32)
    return (dq, jax.tree.map(wide, dweights, more)), dpart

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  skipped = lambda part: jax.tree.map(jnp.zeros_like, part)
  carry = zeros(q), jax.tree.map(zeros, weights)
  carry, dparts = _walk(body, carry, skipped, seen, parts, q.shape[1])
  flat = lambda x, like: jnp.moveaxis(x, 0, 1).reshape(like.shape)
  as_were = lambda x, like: x.astype(like.dtype)
  return (
    *jax.tree.map(as_were, carry[:1], (q,)),
    jax.tree.map(flat, dparts, parts),
    jax.tree.map(as_were, carry[1], weights),
    None,
  )


attend.defvjp(_attend_fwd, _attend_bwd)


def sequence(along: Along, tokens: int, segments: jax.Array | None) -> Sequence:
  """Describes which keys a device's `tokens` queries attend to.

  Args:
    along: the device's shard of the sequence.
    tokens: T.
    segments: [B T] int32 documents of the device's tokens; None for one.
  """
  return Sequence(along.index * tokens, segments, along.gather(segments))
