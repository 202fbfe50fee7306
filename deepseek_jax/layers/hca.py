"""Heavily compressed attention, HCA (V4 section 2.3.2).

Of every m tokens (128) one entry is made, without overlap, and a query reads
all that are complete. Few enough are left that nothing has to be picked.
Legend: B batch, T queries, S entries, D model, H heads, C head dim.
"""

import dataclasses

import jax
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.layers import compressor
from deepseek_jax.layers.compressor import (
  Compressed,
  Compressor,
  CompressorConfig,
)
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.partial_attention import Part, attend
from deepseek_jax.layers.query_blocks import over_blocks


@dataclasses.dataclass(frozen=True)
class HCAConfig:
  """ratio: tokens of an entry (m)."""

  ratio: int = 128

  def __post_init__(self):
    if self.ratio < 1:
      raise InputError(f'hca.ratio = {self.ratio}: must be at least 1')


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
    past: Compressed | None,
    *,
    scale: float,
  ) -> tuple[Part, Compressed | None, dict]:
    """Reads entries of x [B T D] by turned queries q [B T H C].

    The queries' latent is not used. Returns (attention to the entries, cache
    with these tokens, no statistics).
    """
    del latent
    entries, past = self.compressor(x, ctx, past)
    fresh = past is None or ctx.fresh
    view = compressor.view(ctx, self.cfg.ratio, fresh)
    S, H = entries.shape[1], q.shape[2]

    def block(one):
      q, view = one
      return attend(q, entries, view.mask(S), scale)[0]

    return over_blocks(block, (q, view), 128, S * H), past, {}
