"""Computes heavily compressed attention, HCA (DeepSeek-V4 section 2.3.2).

Of every m tokens (128) one entry is made, without overlap, and a query reads
all that are complete. Few enough are left that nothing has to be picked.
Legend: B batch, T queries, S entries, D model, H heads, C head dim.
"""

import dataclasses
from typing import NamedTuple

import jax
from flax import nnx

from deepseek_jax.config import at_least
from deepseek_jax.model.attention import compressor
from deepseek_jax.model.attention.compressor import (
  Compressed,
  Compressor,
  CompressorConfig,
  View,
)
from deepseek_jax.model.attention.partial_softmax import PartialSoftmax, attend
from deepseek_jax.model.attention.query_blocks import over_blocks
from deepseek_jax.model.context import Context
from deepseek_jax.parallel.sequence import Along


@dataclasses.dataclass(frozen=True)
class HCAConfig:
  """Describes the entries of HCA.

  Attributes:
    ratio: tokens of an entry (m).
  """

  ratio: int = 128

  def __post_init__(self):
    """Raises InputError unless ratio >= 1."""
    at_least(self, 'hca.', ratio=1)


class HCA(nnx.Module):
  """Makes the entries and lets queries read them."""

  def __init__(
    self, compress: CompressorConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes the compressor."""
    self.cfg = compress
    self.compressor = Compressor(compress, dim, std=std, rngs=rngs)

  def __call__(
    self,
    q: jax.Array,
    x: jax.Array,
    latent: jax.Array,
    ctx: Context,
    past: Compressed,
    *,
    scale: float,
  ) -> tuple['AllEntries', Compressed]:
    """Gives the entries of the cache and x [B T D] to queries q [B T H C].

    The queries' latent is not used.

    Returns:
      What is read of the entries, and the cache with these tokens.
    """
    del latent
    # Entries so far, with those that these tokens complete: [B S C].
    entries, past = self.compressor(x, ctx, past)
    view = compressor.view(ctx, self.cfg.ratio, fresh=ctx.fresh)
    return AllEntries(q, entries, view, scale), past

  def inputs(
    self, x: jax.Array, latent: jax.Array, ctx: Context
  ) -> tuple[compressor.Tokens, None, tuple]:
    """Returns the inputs of `fresh` for an uncached batch.

    They are the compressor's inputs, None for an index query, and the
    compressor's weights.
    """
    del latent
    return self.compressor.tokens(x, ctx), None, self.compressor.weights()


def fresh(
  cfg: CompressorConfig,
  along: Along,
  q: jax.Array,
  tokens: compressor.Tokens,
  weights: tuple,
  scale: float,
) -> 'AllEntries':
  """Gives the entries of all to local queries (HCA.inputs)."""
  entries = compressor.fresh_entries(cfg, weights, tokens, q.dtype, along)
  where = tokens.positions, tokens.segments
  view = compressor.fresh_view(*where, cfg.ratio, along)
  return AllEntries(q, entries, view, scale)


class AllEntries(NamedTuple):
  """Holds queries and the entries of which they read all in their view."""

  q: jax.Array  # [B T H C]
  entries: jax.Array  # [B S C]
  view: View
  scale: float  # multiplies the scores
  learn: bool = False  # nothing is learned from it

  def seen(self) -> View:
    """Returns what is read."""
    return self.view

  def part(self, seen: View) -> tuple[PartialSoftmax, dict]:
    """Computes attention to the entries."""
    return read(self.q, self.entries, seen, self.scale), {}

  def learned(self, total: jax.Array, seen: View) -> dict:
    """Returns no statistics."""
    del total, seen
    return {}


def read(
  q: jax.Array, entries: jax.Array, view: View, scale: float
) -> PartialSoftmax:
  """Attends from q [B T H C] to the entries [B S C] in each query's view."""
  S, H = entries.shape[1], q.shape[2]

  def block(one: tuple[jax.Array, View], entries: jax.Array) -> PartialSoftmax:
    q, view = one
    return attend(q, entries, view.mask(S), scale)[0]

  # In blocks of 128 queries, so that scores [B n H S] stay small.
  return over_blocks(block, (q, view), 128, S * H, (entries,))
