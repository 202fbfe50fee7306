"""One pre-norm transformer layer: attention and an FFN on a residual stream.

Legend: B batch, T tokens, D model.
"""

import dataclasses

import jax
from flax import nnx

from deepseek_jax.config import above, at_least
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
  """An attention, an FFN and how both sit on the residual stream.

  Attributes:
    attention, ffn, residual, norm_eps: see there.
    engram: the memory before the attention, or None.
    engram_rows: of its table.
  """

  attention: AttentionConfig
  ffn: FFNConfig | MoEConfig
  residual: ResidualConfig | HyperConnectionsConfig = ResidualConfig()
  norm_eps: float = 1e-6
  engram: EngramConfig | None = None
  engram_rows: int = 0

  def __post_init__(self):
    above(self, norm_eps=0)
    at_least(self, engram_rows=0)

  def cache(self, batch: int, slots: int, dim: int, dtype):
    """An empty cache: the attention's, and with a memory a pair of both."""
    attention = self.attention.cache(batch, slots, dtype)
    if self.engram is None:
      return attention
    return attention, self.engram.cache(batch, self.streams, dim, dtype)

  @property
  def routed(self) -> bool:
    """Whether the FFN is a mixture of experts."""
    return hasattr(self.ffn, 'experts')

  @property
  def streams(self) -> int:
    return getattr(self.residual, 'streams', 1)


class Block(nnx.Module):
  def __init__(self, cfg: BlockConfig, dim: int, *, std, rngs: nnx.Rngs):
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

  def __call__(self, stream: jax.Array, ctx: Context, past=None):
    """The stream ([B T D] when plain) -> (stream, cache, statistics)."""
    if self.has_engram:
      past, kept = past or (None, None)
      with jax.named_scope('engram'):
        stream, kept = self.engram(stream, ctx, kept)
    x, how = self.attention_residual.read(stream)
    with jax.named_scope('attention'):
      y, past, seen = self.attention(self.attention_norm(x), ctx, past)
    stream = self.attention_residual.write(stream, y, how)
    x, how = self.ffn_residual.read(stream)
    with jax.named_scope('ffn'):
      y, stats = self.ffn(self.ffn_norm(x), ctx)
    stream = self.ffn_residual.write(stream, y, how)
    if self.has_engram:
      past = past, kept
    return stream, past, {'attention': seen, 'ffn': stats}
