"""Cross entropy of a linear head, without ever holding all its logits.

Legend: N tokens, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.sharding import shard, ways


def _logits(hidden, head):
  return jnp.einsum(
    'ND,DV->NV', hidden, head, preferred_element_type=jnp.float32
  )


def _chunks(n: int, size: int) -> int:
  """The smallest number of equal chunks of at most `size` that make up n."""
  return next(c for c in range(-(-n // size), n + 1) if n % c == 0)


def _split(size: int, *arrays):
  """Arrays [N ...] in equal chunks [chunks n ...] of at most `size` tokens.

  On a mesh of every device: a chunk has some tokens of each, so that all work
  on it and none is sent.
  """
  N = arrays[0].shape[0]
  devices = ways('batch', N)
  chunks = _chunks(N // devices, size)

  def one(a):
    if devices > 1:
      a = a.reshape(devices, chunks, -1, *a.shape[1:]).swapaxes(0, 1)
      a = a.reshape(chunks, N // chunks, *a.shape[3:])
      return shard(a, 'batch', *(None,) * (a.ndim - 2))
    return a.reshape(chunks, -1, *a.shape[1:])

  return tuple(map(one, arrays))


def _join(parts):
  """What `_split` took apart: [chunks n ...] -> [N ...]."""
  chunks, n = parts.shape[:2]
  devices = ways('batch', chunks * n)
  if devices > 1:
    parts = parts.reshape(chunks, devices, -1, *parts.shape[2:])
    parts = parts.swapaxes(0, 1).reshape(chunks, n, *parts.shape[3:])
  return parts.reshape(chunks * n, *parts.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(hidden, head, labels, weights, chunk: int = 1024):
  """The weighted sum of -log softmax(hidden @ head)[label].

  Logits exist for `chunk` tokens at a time. Under differentiation the
  gradients are made in the forward pass, from the same logits: three matmuls
  in all and nothing recomputed. First derivatives only; none for `weights`.

  Args:
    hidden: [N D]; head: [D V].
    labels: [N] int32; weights: [N] float32.
    chunk: tokens at a time, at most; on a mesh of each device.

  Returns:
    float32 scalar.
  """
  parts = _split(chunk, hidden, labels, weights)

  def one(total, part):
    hidden, labels, weights = part
    return total + _nll(_logits(hidden, head), labels, weights)[0], None

  return jax.lax.scan(one, jnp.float32(0), parts)[0]


def _nll(logits, labels, weights):
  """Loss of one chunk, and which logit is each token's label [n V]."""
  hit = labels[:, None] == jnp.arange(logits.shape[-1])
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.where(hit, logits, 0).sum(axis=-1)
  return jnp.sum((lse - picked) * weights), hit, lse


def _forward(hidden, head, labels, weights, chunk):
  parts = _split(chunk, hidden, labels, weights)
  transposed = head.T  # once, not per chunk

  def one(carry, part):
    total, dhead = carry
    h, labels, weights = part
    logits = _logits(h, head)
    loss, hit, lse = _nll(logits, labels, weights)
    dlogits = (jnp.exp(logits - lse[:, None]) - hit) * weights[:, None]
    dlogits = dlogits.astype(h.dtype)
    dhead += jnp.einsum(
      'ND,NV->DV', h, dlogits, preferred_element_type=jnp.float32
    )
    return (total + loss, dhead), dlogits @ transposed

  start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
  (total, dhead), dhidden = jax.lax.scan(one, start, parts)
  return total, (_join(dhidden), dhead.astype(head.dtype))


def _backward(chunk, gradients, g):
  del chunk
  dhidden, dhead = gradients
  scale = lambda a: (a * g).astype(a.dtype)
  return scale(dhidden), scale(dhead), None, None


linear_cross_entropy.defvjp(_forward, _backward)


def token_log_probs(hidden, head, labels, chunk: int = 1024) -> jax.Array:
  """log softmax(hidden @ head)[label] per token; logits are recomputed.

  Args:
    hidden: [... D]; head: [D V]; labels: [...] int32.
    chunk: tokens at a time, at most.

  Returns:
    [...] float32, differentiable.
  """
  flat = hidden.reshape(-1, hidden.shape[-1])
  parts = _split(chunk, flat, labels.reshape(-1))

  @jax.checkpoint
  def one(part):
    logits = _logits(part[0], head)
    picked = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)

  return _join(jax.lax.map(one, parts)).reshape(labels.shape)
