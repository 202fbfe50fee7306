"""One pre-norm transformer layer: attention and an FFN on a residual stream.

Legend: B batch, T tokens, D model.
"""

import dataclasses

import jax
from flax import nnx

from deepseek_jax.layers.context import Context
from deepseek_jax.layers.ffn import FFNConfig
from deepseek_jax.layers.gqa import GQAConfig
from deepseek_jax.layers.hyper_connections import HyperConnectionsConfig
from deepseek_jax.layers.mla import MLAConfig
from deepseek_jax.layers.moe import MoEConfig
from deepseek_jax.layers.norm import RMSNorm
from deepseek_jax.layers.residual import ResidualConfig

AttentionConfig = MLAConfig | GQAConfig


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """An attention, an FFN and how both sit on the residual stream."""

  attention: AttentionConfig
  ffn: FFNConfig | MoEConfig
  residual: ResidualConfig | HyperConnectionsConfig = ResidualConfig()
  norm_eps: float = 1e-6


class Block(nnx.Module):
  def __init__(self, cfg: BlockConfig, dim: int, *, std, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(dim, eps=cfg.norm_eps, rngs=rngs)
    connect = lambda: cfg.residual.build(dim, std=std, rngs=rngs)
    self.attention_residual = connect()
    self.attention = cfg.attention.build(dim, std=std, rngs=rngs)
    self.ffn_norm = RMSNorm(dim, eps=cfg.norm_eps, rngs=rngs)
    self.ffn_residual = connect()
    self.ffn = cfg.ffn.build(dim, std=std, rngs=rngs)

  def __call__(self, stream: jax.Array, ctx: Context, past=None):
    """The stream ([B T D] when plain) -> (stream, cache, statistics)."""
    x, how = self.attention_residual.read(stream)
    with jax.named_scope('attention'):
      y, past, seen = self.attention(self.attention_norm(x), ctx, past)
    stream = self.attention_residual.write(stream, y, how)
    x, how = self.ffn_residual.read(stream)
    with jax.named_scope('ffn'):
      y, stats = self.ffn(self.ffn_norm(x), ctx)
    stream = self.ffn_residual.write(stream, y, how)
    return stream, past, {'attention': seen, 'ffn': stats}
