"""Runs a pre-norm transformer layer: attention and an FFN on a residual stream.

Legend: B batch, T tokens, D model, n streams.
"""

import dataclasses
import inspect
from typing import Any

import jax
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.memory.engram import Engram, EngramConfig
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.residual import ResidualConfig

AttentionConfig = MLAConfig | GQAConfig | DSAConfig | SharedKVConfig | NSAConfig


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """Describes an attention, an FFN and how both use the residual stream.

  Attributes:
    attention, ffn, residual, norm_eps: see their classes.
    engram: the Engram before the attention, or None.
    engram_rows: rows of its table.
  """

  attention: AttentionConfig
  ffn: FFNConfig | MoEConfig
  residual: ResidualConfig | HyperConnectionsConfig = ResidualConfig()
  norm_eps: float = 1e-6
  engram: EngramConfig | None = None
  engram_rows: int = 0

  def __post_init__(self):
    """Raises InputError unless norm_eps > 0 and engram_rows >= 0."""
    above(self, norm_eps=0)
    at_least(self, engram_rows=0)

  def cache(
    self,
    batch: int,
    slots: int,
    dim: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
    held: jax.typing.DTypeLike | None = None,
  ) -> Any:
    """Returns an empty cache of `dtype` for `batch` rows of `slots` tokens.

    It is the attention's cache, of dtype `held` if that is given; with an
    Engram, the pair (attention, Engram). Rows may be rewound by up to `spare`
    tokens.

    Raises:
      InputError: an attention of one's own that can't be rewound.
    """
    make, more = self.attention.cache, {}
    if spare:
      if 'spare' not in inspect.signature(make).parameters:
        raise InputError(
          f'spare = {spare}: {type(self.attention).__name__}.cache takes no'
          ' `spare: int = 0`; add it, and make rings that much longer'
        )
      more = {'spare': spare}
    attention = make(batch, slots, dtype if held is None else held, **more)
    if self.engram is None:
      return attention
    memory = self.engram.cache(batch, self.streams, dim, dtype, spare)
    return attention, memory

  @property
  def routed(self) -> bool:
    """Returns whether the FFN is a mixture of experts."""
    return hasattr(self.ffn, 'experts')

  @property
  def streams(self) -> int:
    """Returns the number of residual streams: 1 without hyper-connections."""
    return getattr(self.residual, 'streams', 1)


class Block(nnx.Module):
  """Computes one layer: Engram (if any), attention, FFN, each on the stream."""

  def __init__(self, cfg: BlockConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes the weights, drawn with `std`.

    Args:
      cfg: the layer's configuration.
      dim: D.
      std: of the normal distribution of the weight matrices.
      rngs: random streams of `params`.
    """
    self.attention_norm = RMSNorm(dim, eps=cfg.norm_eps, rngs=rngs)
    connect = lambda: cfg.residual.build(dim, std=std, rngs=rngs)
    self.has_engram = cfg.engram is not None
    if self.has_engram:
      self.engram = Engram(
        cfg.engram,
        dim,
        streams=cfg.streams,
        rows=cfg.engram_rows,
        std=std,
        rngs=rngs,
      )
    self.attention_residual = connect()
    self.attention = cfg.attention.build(dim, std=std, rngs=rngs)
    self.ffn_norm = RMSNorm(dim, eps=cfg.norm_eps, rngs=rngs)
    self.ffn_residual = connect()
    self.ffn = cfg.ffn.build(dim, std=std, rngs=rngs)

  def __call__(
    self, stream: jax.Array, ctx: Context, past: Any = None
  ) -> tuple[jax.Array, Any, dict]:
    """Returns (stream, cache, statistics) after this layer.

    Args:
      stream: [B T D], or [B T n D] with hyper-connections.
      ctx: the tokens.
      past: as `BlockConfig.cache` makes it, or None without a cache.

    Returns:
      The new stream, the cache with these tokens (None without one), and the
      statistics {'attention': ..., 'ffn': ...}.
    """
    if self.has_engram:
      # Without a cache both halves are None.
      past, kept = past or (None, None)
      with jax.named_scope('engram'):
        stream, kept = self.engram(stream, ctx, kept)
    # Attention on one stream [B T D], read from n and written back to n.
    x, how = self.attention_residual.read_normed(stream, self.attention_norm)
    with jax.named_scope('attention'):
      y, past, seen = self.attention(x, ctx, past)
    stream = self.attention_residual.write(stream, y, how)
    # The FFN reads what the attention has added.
    x, how = self.ffn_residual.read_normed(stream, self.ffn_norm)
    with jax.named_scope('ffn'):
      y, stats = self.ffn(x, ctx)
    stream = self.ffn_residual.write(stream, y, how)
    if self.has_engram:
      past = past, kept
    return stream, past, {'attention': seen, 'ffn': stats}
