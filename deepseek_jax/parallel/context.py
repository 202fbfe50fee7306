"""Context parallelism for latent attention: a sequence split over devices.

Each device keeps the queries of its own tokens and gathers the latents of all:
C + R numbers a token for all heads together, where keys and values would be
H (N + R + V): 576 against 57,344 in DeepSeek-V3. So there is nothing worth
hiding behind a ring; the latents are gathered once, and keys and values are
expanded for a block of tokens at a time (arXiv:2405.04434, section 2.1.2).
Blocks that lie ahead of all queries are skipped, so the last device has the
most to do; to even that out tokens would have to change places before the
embedding and back before prediction. The backward pass gathers nothing: it
keeps the latents, makes the scores again, and scatters the latents' gradients,
as small as they are.
Legend: B batch, T queries of a device, S keys of a block, H heads, C latent,
N no-rope dim, R rope dim, V value dim, K = N + R.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax import sharding

_NEG = -1e30
_BLOCK = 1024  # keys expanded at a time, at most


class Sequence(NamedTuple):
  """What each query may see."""

  first: jax.Array  # int32, index of the first query in its row
  queries: jax.Array | None  # [B T] int32 documents, or None for one
  keys: jax.Array | None  # [B all] int32


def mesh_axis(length: int) -> str | None:
  """The mesh axis that splits a sequence of `length`; None if none does."""
  using = sharding.current()
  name = using and using.rules.get('seq')
  if isinstance(name, tuple):
    name = name[0] if len(name) == 1 else None
  if not name or using.mesh.shape[name] == 1 or length % using.mesh.shape[name]:
    return None
  return name


def _dot(spec, a, b):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _expand(c, kr, up, nope):
  """Latents [B S C], rotary keys [B S R], up [C H N+V] -> keys, values."""
  kn, v = jnp.split(jnp.einsum('BSC,CHK->BSHK', c, up), [nope], axis=-1)
  kr = jnp.broadcast_to(kr[:, :, None], (*kn.shape[:3], kr.shape[-1]))
  return jnp.concatenate([kn, kr], axis=-1), v


def _blocks(x, size):
  """[B all ...] -> [blocks B size ...]; None stays."""
  if x is None:
    return None
  B, length = x.shape[:2]
  return jnp.moveaxis(x.reshape(B, length // size, size, *x.shape[2:]), 1, 0)


def _mask(seen: Sequence, start, documents, length: int, size: int):
  """[B 1 T S] bool: which keys from `start` on each query sees."""
  query = seen.first + jnp.arange(length)
  mask = (query[:, None] >= start + jnp.arange(size))[None, None]
  if documents is None:
    return mask
  return mask & (seen.queries[:, None, :, None] == documents[:, None, None])


def _walk(body, carry, skipped, seen: Sequence, parts, length: int):
  """Scans `body` over blocks of keys, past those ahead of all queries."""
  most = min(length, _BLOCK)
  size = next(s for s in range(most, 0, -1) if length % s == 0)
  parts = [_blocks(x, size) for x in (*parts, seen.keys)]
  starts = jnp.arange(parts[0].shape[0]) * size

  def one(carry, block):
    start, c, kr, documents = block
    mask = _mask(seen, start, documents, length, size)
    near = lambda carry: body(carry, c, kr, mask)
    far = lambda carry: (carry, skipped(c, kr))
    return jax.lax.cond(start < seen.first + length, near, far, carry)

  return jax.lax.scan(one, carry, (starts, *parts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _core(q, c, kr, up, seen: Sequence, scale):
  """q [B T H K], all latents c kr [B all .], up [C H N+V] -> [B T H V]."""
  return _core_fwd(q, c, kr, up, seen, scale)[0]


def _core_fwd(q, c, kr, up, seen, scale):
  B, T, H, K = q.shape
  nope = K - kr.shape[-1]

  def body(carry, c, kr, mask):
    out, top, total = carry
    k, v = _expand(c, kr, up, nope)
    scores = jnp.where(mask, _dot('BTHK,BSHK->BHTS', q, k) * scale, _NEG)
    new = jnp.maximum(top, scores.max(axis=-1))
    p, old = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
    more = _dot('BHTS,BSHV->BHTV', p.astype(v.dtype), v)
    out = out * old[..., None] + more
    return (out, new, total * old + p.sum(axis=-1)), None

  f32 = functools.partial(jnp.full, dtype=jnp.float32)
  start = (
    f32((B, H, T, up.shape[-1] - nope), 0),
    f32((B, H, T), _NEG),
    f32((B, H, T), 0),
  )
  skipped = lambda c, kr: None
  (out, top, total), _ = _walk(body, start, skipped, seen, (c, kr), T)
  out = (out / total[..., None]).astype(q.dtype).transpose(0, 2, 1, 3)
  return out, (q, c, kr, up, seen, out, top + jnp.log(total))


def _core_bwd(scale, saved, grad):
  q, c, kr, up, seen, out, normalizer = saved
  nope = q.shape[-1] - kr.shape[-1]
  delta = _dot('BTHV,BTHV->BHT', grad, out)

  def body(carry, c, kr, mask):
    dq, dup = carry
    expand = functools.partial(_expand, nope=nope)
    (k, v), pull = jax.vjp(expand, c, kr, up)
    p = jnp.exp(_dot('BTHK,BSHK->BHTS', q, k) * scale - normalizer[..., None])
    p = jnp.where(mask, p, 0.0)
    dv = _dot('BHTS,BTHV->BSHV', p.astype(grad.dtype), grad)
    dp = _dot('BTHV,BSHV->BHTS', grad, v)
    ds = (p * (dp - delta[..., None]) * scale).astype(q.dtype)
    dk = _dot('BHTS,BTHK->BSHK', ds, q)
    dc, dkr, more = pull((dk.astype(k.dtype), dv.astype(v.dtype)))
    dq += _dot('BHTS,BSHK->BTHK', ds, k)
    return (dq, dup + more.astype(jnp.float32)), (dc, dkr)

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  skipped = lambda c, kr: (jnp.zeros_like(c), jnp.zeros_like(kr))
  carry = zeros(q), zeros(up)
  carry, parts = _walk(body, carry, skipped, seen, (c, kr), q.shape[1])
  flat = lambda x, like: jnp.moveaxis(x, 0, 1).reshape(like.shape)
  dq, dup = carry
  return (
    dq.astype(q.dtype),
    flat(parts[0], c),
    flat(parts[1], kr),
    dup.astype(up.dtype),
    None,
  )


_core.defvjp(_core_fwd, _core_bwd)


def latent_attention(
  q: jax.Array,
  c: jax.Array,
  kr: jax.Array,
  up: jax.Array,
  *,
  scale: float,
  segments: jax.Array | None = None,
) -> jax.Array:
  """Causal latent attention of sequences that `seq` splits over the mesh.

  To be traced inside `sharding.use` where `mesh_axis` names an axis. First
  derivatives only.

  Args:
    q: [B T H N+R], T the whole length.
    c: [B T C]; kr: [B T R]: latents and turned rotary keys.
    up: [C H N+V].
    scale: multiplies the scores.
    segments: [B T] int32 document of each token, or None for one document.

  Returns:
    [B T H V] in q's dtype.
  """
  using, axis = sharding.current(), mesh_axis(q.shape[1])
  gather = functools.partial(
    jax.lax.all_gather, axis_name=axis, axis=1, tiled=True
  )

  def local(q, c, kr, up, segments):
    first = jax.lax.axis_index(axis) * q.shape[1]
    keys = None if segments is None else gather(segments)
    seen = Sequence(first, segments, keys)
    return _core(q, gather(c), gather(kr), up, seen, scale)

  heads = using.spec(('batch', 'seq', 'heads', None), q.shape)
  flat = using.spec(('batch', 'seq', None), c.shape)
  whole = using.spec((None, 'heads', None), up.shape)
  rows = None if segments is None else using.spec(('batch', 'seq'), q.shape[:2])
  return jax.shard_map(
    local,
    mesh=using.mesh,
    in_specs=(heads, flat, flat, whole, rows),
    out_specs=heads,
    check_vma=False,
  )(q, c, kr, up, segments)
