"""Heavily compressed attention, HCA (V4 section 2.3.2).

Of every m tokens (128) one entry is made, without overlap, and a query reads
all that are complete. Few enough are left that nothing has to be picked.
Legend: B batch, T queries, S entries, D model, H heads, C head dim.
"""

import dataclasses

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
from deepseek_jax.model.attention.partial_softmax import Part, attend
from deepseek_jax.model.attention.query_blocks import over_blocks
from deepseek_jax.model.context import Context
from deepseek_jax.parallel.sequence import Along


@dataclasses.dataclass(frozen=True)
class HCAConfig:
  """ratio: tokens of an entry (m)."""

  ratio: int = 128

  def __post_init__(self):
    at_least(self, 'hca.', ratio=1)


class HCA(nnx.Module):
  """The entries and how queries read them."""

  def __init__(
    self, compress: CompressorConfig, dim: int, *, std, rngs: nnx.Rngs
  ):
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
  ) -> tuple[Part, Compressed]:
    """Reads the cache and x [B T D] by turned queries q [B T H C].

    The queries' latent is not used. Returns (attention to the entries, cache
    with these tokens).
    """
    del latent
    entries, past = self.compressor(x, ctx, past)
    view = compressor.view(ctx, self.cfg.ratio, fresh=ctx.fresh)
    return read(q, entries, view, scale), past

  def inputs(self, x: jax.Array, latent: jax.Array, ctx: Context):
    """Of a fresh batch: what entries draw on, what queries bring, weights."""
    del latent
    return self.compressor.tokens(x, ctx), None, self.compressor.weights()


def fresh(
  cfg: CompressorConfig, along: Along, q, tokens, weights, scale: float
) -> Part:
  """Attention of own queries to the entries of all; see HCA.inputs."""
  entries = compressor.fresh_entries(cfg, weights, tokens, q.dtype, along)
  where = tokens.positions, tokens.segments
  view = compressor.fresh_view(*where, cfg.ratio, along)
  return read(q, entries, view, scale)


def read(q: jax.Array, entries: jax.Array, view: View, scale: float) -> Part:
  """Attention of q [B T H C] to the entries [B S C] that each sees."""
  S, H = entries.shape[1], q.shape[2]

  def block(one, entries):
    q, view = one
    return attend(q, entries, view.mask(S), scale)[0]

  return over_blocks(block, (q, view), 128, S * H, (entries,))
