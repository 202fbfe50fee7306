"""Reads a window and compressed entries in one softmax with sinks (V4).

A kernel gathers what each query reads of both, forward and backward; XLA's code
computes a part for each and joins them by their log-sums.
Legend: B batch, T queries, P tokens before, S entries, K picked ones, H heads,
C head dim, W window.
"""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.model import kernels
from deepseek_jax.model.attention.compressor import View
from deepseek_jax.model.attention.partial_softmax import (
  PartialSoftmax,
  join,
  window_attention,
)
from pallas_kernels.sparse_mla import ChosenKeys, attend


class Far(Protocol):
  """Describes entries that queries read beside the window.

  `EntryAttention` (CSA) and `AllEntries` (HCA) are such.
  """

  entries: jax.Array  # [B S C]
  learn: bool

  def seen(self) -> jax.Array | View:
    """Returns which entries are read: [B T K], or all in view."""

  def part(self, seen: jax.Array | View) -> tuple[PartialSoftmax, dict]:
    """Computes attention to them, and statistics."""

  def learned(self, total: jax.Array, seen: jax.Array | View) -> dict:
    """Returns the statistics alone, given the log-sum-exp of all."""


class Window(NamedTuple):
  """Holds the tokens that queries read one by one.

  Attributes:
    keys: [B T C], of the queries' own tokens.
    segments: [B T] documents; a token attends to no other.
    size: W, the query's own included.
    history: keys [B W-1 C] and segments [B W-1] of the tokens before, or None.
  """

  keys: jax.Array
  segments: jax.Array
  size: int
  history: tuple[jax.Array, jax.Array] | None

  def part(self, q: jax.Array, scale: float) -> PartialSoftmax:
    """Computes attention of q [B T H C] to the window."""
    how = {'scale': scale, 'history': self.history}
    return window_attention(q, self.keys, self.segments, self.size, **how)


def read(
  q: jax.Array,
  near: Window,
  far: Far | None,
  sinks: jax.Array,
  scale: float,
) -> tuple[jax.Array, dict]:
  """Attends from q [B T H C] to a window, entries and sinks [H].

  Returns:
    [B T H C], and the statistics of `far`.
  """
  seen, entries = (None, None) if far is None else (far.seen(), far.entries)
  rows, heads = ('batch',), ('batch', None, 'heads')
  found = kernels.pick(
    'sparse_mla',
    functools.partial(_by_kernel, size=near.size, scale=scale),
    lambda: None,
    (q, near.keys, near.segments, near.history, entries, seen, sinks),
    (heads, rows, rows, rows, rows, rows, ('heads',)),
    (heads, heads),
  )
  if found is not None:
    y, total = found
    return y, {} if far is None else far.learned(total, seen)
  parts, stats = [near.part(q, scale)], {}
  if far is not None:
    if far.learn:
      # What else shares the softmax with the entries, for the loss.
      far = far._replace(rest=jnp.logaddexp(parts[0].log_sum, sinks))
    part, stats = far.part(seen)
    parts.append(part)
  return join(parts, sinks), stats


def _by_kernel(
  impl: str,
  q: jax.Array,
  keys: jax.Array,
  segments: jax.Array,
  history: tuple[jax.Array, jax.Array] | None,
  entries: jax.Array | None,
  seen: jax.Array | View | None,
  sinks: jax.Array,
  *,
  size: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns y [B T H C] and the log-sum-exp of all scores [B T H]."""
  theirs = segments
  if history is not None:
    keys = jnp.concatenate([history[0], keys], axis=1)
    theirs = jnp.concatenate([history[1], segments], axis=1)
  lists = [ChosenKeys(keys, None, window_rows(segments, theirs, size))]
  if entries is not None:
    if isinstance(seen, View):
      mask = seen.mask(entries.shape[1])
      seen = jnp.where(mask, jnp.arange(entries.shape[1]), -1)
    lists.append(ChosenKeys(entries, None, seen))
  return attend(q, None, tuple(lists), scale=scale, sinks=sinks, impl=impl)


def window_rows(segments: jax.Array, theirs: jax.Array, size: int) -> jax.Array:
  """Returns the rows of a window that each query reads, [B T W]; -1 for none.

  Args:
    segments: [B T] of the queries.
    theirs: [B P+T] of the keys: those before, then the queries' own.
    size: W.
  """
  T = segments.shape[1]
  own = theirs.shape[1] - T + jnp.arange(T)
  at = own[:, None] + jnp.arange(1 - size, 1)  # [T W]
  same = theirs[:, jnp.maximum(at, 0)] == segments[..., None]
  return jnp.where((at >= 0) & same, at, -1)
