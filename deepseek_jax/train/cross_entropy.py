"""Computes the cross entropy of a linear head, never storing all its logits.

Legend: N tokens, D model, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from deepseek_jax.model import lookup
from deepseek_jax.model.attention.query_blocks import each
from deepseek_jax.parallel import products
from deepseek_jax.parallel.sharding import known, shard, ways

IGNORED = -100  # a label that counts nowhere, by PyTorch's custom


def float32_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
  """Returns hidden [N D] @ head [D V] in float32, [N V]."""
  return jnp.einsum(
    'ND,DV->NV', hidden, head, preferred_element_type=jnp.float32
  )


def split_tokens(size: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Splits arrays [N ...] into equal chunks [chunks n ...] of at most `size`.

  Zeros pad the last chunk: fewer than one per chunk, whatever divides N. On a
  mesh every device pads its local tokens: a chunk has some of each, so that all
  devices work on it and no token is sent.
  """
  N = arrays[0].shape[0]
  devices = ways('batch', N)
  chunks = max(1, -(-N // devices // size))
  length = -(-N // devices // chunks)

  def one(a: jax.Array) -> jax.Array:
    # [N ...] -> [devices N/devices ...], each device's tokens in a row.
    a = a.reshape(devices, N // devices, *a.shape[1:])
    # Pad to a whole number of chunks.
    filler = [(0, 0)] * a.ndim
    filler[1] = (0, chunks * length - N // devices)
    a = jnp.pad(a, filler) if filler[1][1] else a
    # Chunks first: each has `length` tokens of every device.
    a = a.reshape(devices, chunks, length, *a.shape[2:]).swapaxes(0, 1)
    a = a.reshape(chunks, devices * length, *a.shape[3:])
    return shard(a, 'batch', *(None,) * (a.ndim - 2)) if devices > 1 else a

  return tuple(map(one, arrays))


def join_tokens(parts: jax.Array, N: int) -> jax.Array:
  """Returns the array that `split_tokens` split: [chunks n ...] -> [N ...]."""
  chunks, n = parts.shape[:2]
  devices = ways('batch', N)
  parts = parts.reshape(chunks, devices, n // devices, *parts.shape[2:])
  # Devices first again, then the padding goes.
  parts = parts.swapaxes(0, 1).reshape(devices, -1, *parts.shape[3:])
  return parts[:, : N // devices].reshape(N, *parts.shape[2:])


def _check_labels(labels: jax.Array, counted: jax.Array, vocab: int) -> None:
  """Raises InputError for a counted label outside 0..vocab - 1, if known."""
  labels, counted = known(labels), known(counted)
  if labels is None or counted is None:  # traced: the result is NaN
    return
  wrong = labels[((labels < 0) | (labels >= vocab)) & counted]
  if wrong.size:
    raise InputError(
      f'labels: {wrong[0]} is outside the vocabulary of {vocab}; give what is'
      f' not to be predicted the weight 0, or to token_log_probs {IGNORED}'
    )


def _or_nan(values: jax.Array, labels: jax.Array, vocab: int) -> jax.Array:
  """Returns values [n], NaN where the label is outside the vocabulary."""
  return jnp.where((labels >= 0) & (labels < vocab), values, jnp.nan)


def linear_cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  chunk: int = 1024,
) -> jax.Array:
  """Returns the weighted sum of -log softmax(hidden @ head)[label].

  Logits exist for `chunk` tokens at a time. Under differentiation the
  gradients are made in the forward pass, from the same logits: three matmuls
  in all and nothing recomputed. First derivatives only; none for `weights`.

  Args:
    hidden: [N D]; head: [D V].
    labels: [N] int32, of any value where the weight is 0.
    weights: [N] float32.
    chunk: tokens at a time, at most; on a mesh of each device.

  Returns:
    float32 scalar; NaN, as the gradients, where a traced label with a weight
    is outside the vocabulary.

  Raises:
    InputError: such a label is known when this is called.
  """
  labels = lookup.int32(labels)
  _check_labels(labels, jnp.not_equal(weights, 0), head.shape[-1])
  return _cross_entropy(hidden, head, labels, weights, chunk)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  chunk: int,
) -> jax.Array:
  """Returns the loss alone, a float32 scalar, where no gradient is taken."""
  weights = _counted(labels, weights, head.shape[-1])
  parts = split_tokens(chunk, hidden, labels, weights)

  def one(
    total: jax.Array, part: tuple[jax.Array, ...]
  ) -> tuple[jax.Array, None]:
    hidden, labels, weights = part
    return total + _nll(float32_logits(hidden, head), labels, weights)[0], None

  return jax.lax.scan(one, jnp.float32(0), parts)[0]


def _counted(labels: jax.Array, weights: jax.Array, vocab: int) -> jax.Array:
  """Returns weights [N], NaN where a counted label is no token."""
  return jnp.where(weights == 0, 0.0, _or_nan(weights, labels, vocab))


def _nll(
  logits: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the loss of one chunk and what its gradient needs.

  Returns:
    The loss, a float32 scalar; which logit is each token's label [n V], bool;
    the log-sum-exp of each token's logits [n].
  """
  # A comparison in place of a gather, which the gradient reuses.
  hit = labels[:, None] == jnp.arange(logits.shape[-1])
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.where(hit, logits, 0).sum(axis=-1)
  return jnp.sum((lse - picked) * weights), hit, lse


def _forward(
  hidden: jax.Array,
  head: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  chunk: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the loss and its gradients for a gradient of 1."""
  weights = _counted(labels, weights, head.shape[-1])
  parts = split_tokens(chunk, hidden, labels, weights)
  transposed = head.T  # once, not per chunk

  def one(
    carry: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    total, dhead = carry
    h, labels, weights = part
    # [n V], the only logits that exist.
    logits = float32_logits(h, head)
    loss, hit, lse = _nll(logits, labels, weights)
    # Gradient of the logits: softmax minus the one-hot label.
    dlogits = (jnp.exp(logits - lse[:, None]) - hit) * weights[:, None]
    dlogits = dlogits.astype(h.dtype)
    # The head's gradient adds up in float32 over the chunks.
    dhead += _of_head(h, dlogits)
    return (total + loss, dhead), products.matmul(dlogits, transposed)

  start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
  (total, dhead), dhidden = jax.lax.scan(one, start, parts)
  return total, (join_tokens(dhidden, len(hidden)), dhead.astype(head.dtype))


def _of_head(hidden: jax.Array, dlogits: jax.Array) -> jax.Array:
  """Returns hidden.T @ dlogits in float32: [n D] and [n V] -> [D V]."""

  def columns_first(hidden: jax.Array, dlogits: jax.Array) -> jax.Array:
    # XLA:CPU multiplies a transposed operand at half the rate of a plain one
    # (72 for 164 GFLOP/s at D 384, V 8192), and would fold this transpose.
    return float32_logits(jax.lax.optimization_barrier(hidden.T), dlogits)

  folded = lambda hidden, dlogits: jnp.einsum(
    'ND,NV->DV', hidden, dlogits, preferred_element_type=jnp.float32
  )
  return jax.lax.platform_dependent(
    hidden, dlogits, cpu=columns_first, default=folded
  )


def _backward(
  chunk: int, gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
  """Scales the gradients of the forward pass by the gradient of the loss."""
  del chunk
  dhidden, dhead = gradients
  scale = lambda a: (a * g).astype(a.dtype)
  return scale(dhidden), scale(dhead), None, None


_cross_entropy.defvjp(_forward, _backward)


def token_log_probs(
  hidden: jax.Array, head: jax.Array, labels: jax.Array, chunk: int = 1024
) -> jax.Array:
  """Returns log softmax(hidden @ head)[label] per token; recomputes logits.

  Args:
    hidden: [... D]; head: [D V].
    labels: [...] int32; IGNORED (-100) is no token.
    chunk: tokens at a time, at most.

  Returns:
    [...] float32, differentiable; 0 where the label is IGNORED, without a
    gradient; NaN where another traced label is outside the vocabulary.

  Raises:
    InputError: such a label is known when this is called.
  """
  labels = lookup.int32(labels)
  _check_labels(labels, labels != IGNORED, head.shape[-1])
  flat = hidden.reshape(-1, hidden.shape[-1])
  parts = split_tokens(chunk, flat, labels.reshape(-1))

  def one(part: tuple[jax.Array, jax.Array], head: jax.Array) -> jax.Array:
    logits = float32_logits(part[0], head)
    labels = jnp.where(part[1] == IGNORED, 0, part[1])
    # Labels outside the vocabulary must not be read; they give NaN below.
    at = jnp.clip(labels, 0, head.shape[-1] - 1)
    picked = jnp.take_along_axis(logits, at[:, None], axis=-1)[:, 0]
    said = picked - jax.nn.logsumexp(logits, axis=-1)
    # A factor, not a choice: gradients become NaN, too.
    said *= _or_nan(jnp.ones_like(said), labels, head.shape[-1])
    return jnp.where(part[1] == IGNORED, 0.0, said)

  return join_tokens(each(one, parts, (head,)), len(flat)).reshape(labels.shape)
