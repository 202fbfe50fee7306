"""Windows of tokens compressed to entries, in XLA."""

import jax
import jax.numpy as jnp

NONE = -1e30  # logit of a token that is not there


def compress(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> jax.Array:
  """Returns the entries [B S C]; zeros where there is none."""
  there = (at >= 0)[..., None, None]
  # Before the sum, so that no gradient comes of what stands in for none.
  windows = _windows(kv, gate, bias, at, before)
  return _weighted(*(jnp.where(there, a, 0) for a in windows))


def entries(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> jax.Array:
  """Returns the entries [B S C]; a mean of row 0 where there is none."""
  return _weighted(*_windows(kv, gate, bias, at, before))


def _weighted(value: jax.Array, logit: jax.Array) -> jax.Array:
  """Returns a softmax over the window for each channel, times the values.

  Args:
    value, logit: [B S R C].
  """
  return (jax.nn.softmax(logit, axis=2) * value).sum(axis=2)


def compress_saving(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the entries, the largest logits and the sums of exp(logit - it).

  Each is [B S C].
  """
  _, logit = _windows(kv, gate, bias, at, before)
  top = logit.max(axis=2)
  total = jnp.exp(logit - top[:, :, None]).sum(axis=2)
  return compress(kv, gate, bias, at, before), top, total


def compress_bwd(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
  saved: tuple[jax.Array, jax.Array, jax.Array],
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of kv, gate and bias; needs nothing of `saved`."""
  del saved
  run = lambda *args: compress(*args, at, before)
  return jax.vjp(run, kv, gate, bias)[1](grad)


def _windows(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  at: jax.Array,
  before: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
  """Returns values and logits [B S R C] of what entries draw on."""
  value, logit = _window(kv, gate, bias, at, -1)
  if before is None:
    return value, logit
  # The first series reads the window before, where there is one.
  value_before, logit_before = _window(kv, gate, bias, before, 0)
  there = (before >= 0)[..., None, None]
  value_before = jnp.where(there, value_before, 0)
  logit_before = jnp.where(there, logit_before, NONE)
  value = jnp.concatenate([value_before, value], axis=2)
  return value, jnp.concatenate([logit_before, logit], axis=2)


def _window(
  kv: jax.Array, gate: jax.Array, bias: jax.Array, last: jax.Array, series: int
) -> tuple[jax.Array, jax.Array]:
  """Returns values and logits [B S m C] of a series of windows up to `last`."""
  at = last[..., None] + jnp.arange(1 - bias.shape[0], 1)  # [B S m]
  rows = jnp.arange(at.shape[0])[:, None, None]
  pick = lambda a: a[:, :, series][rows, jnp.maximum(at, 0)]
  return pick(kv), pick(gate) + bias[:, series]
