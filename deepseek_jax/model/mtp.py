"""Predicts several tokens ahead (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Depth k predicts token i+k+1 from the state of depth k-1 at i and the embedding
of token i+k, through one more block; embedding and head are the main model's.
The released checkpoints concatenate [embedding; hidden] where the paper writes
[hidden; embedding]; the checkpoints' order is kept. The paper leaves open on
which side of the final norm the state is taken; like transformers, after it.
V4 keeps the streams of its hyper-connections apart: embedding and every stream
are projected by themselves and added, and the block's streams go on.
Legend: B batch, T tokens, D model, n streams.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import at_least
from deepseek_jax.model.block import Block, BlockConfig
from deepseek_jax.model.context import Context
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import products
from deepseek_jax.parallel.sharding import param

# Whether tokens further ahead are predicted. 'alone': what they teach reaches
# the blocks that predict them, and neither embedding nor layers before.
Ahead = bool | Literal['alone']


@dataclasses.dataclass(frozen=True)
class MTPConfig:
  """Describes which tokens are predicted, and how.

  Attributes:
    depth: tokens predicted beyond the next (0: none).
    block: the kind of block of every depth.
    streams: each residual stream is projected by itself (V4).
  """

  depth: int = 1
  block: str = 'moe'
  streams: bool = False

  def __post_init__(self):
    """Raises InputError for a negative depth."""
    at_least(self, 'mtp.', depth=0)

  def build(
    self, block: BlockConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ) -> 'MTP | StreamMTP':
    """Returns the module of one depth."""
    kind = StreamMTP if self.streams else MTP
    return kind(block, dim, std=std, rngs=rngs)


class MTP(nnx.Module):
  """Computes one depth, as in V3."""

  def __init__(
    self, block: BlockConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes the norms, the projection [2 D, D] and the block."""
    self.cfg = block
    norm = lambda: RMSNorm(dim, eps=block.norm_eps, rngs=rngs)
    init = nnx.initializers.normal(std)
    self.embed_norm, self.hidden_norm, self.norm = norm(), norm(), norm()
    self.merge = param(rngs, init, (2 * dim, dim), (None, 'embed'))
    self.block = Block(block, dim, std=std, rngs=rngs)
    self.residual = block.residual.head(dim, std=std, rngs=rngs)

  def __call__(
    self,
    hidden: jax.Array,
    embedded: jax.Array,
    ctx: Context,
    past: Any = None,
  ) -> tuple[jax.Array, Any, dict]:
    """Returns the states [B T D] of this depth, its cache and its statistics.

    Args:
      hidden: [B T D], states of the depth before.
      embedded: [B T D], embeddings of the tokens ahead.
      ctx: the context of those tokens, see `shifted`.
      past: the block's cache; without one (None) a depth attends to the tokens
        of this batch.
    """
    # Both are normed first, for their scales differ: [B T 2D] -> [B T D].
    x = [self.embed_norm(embedded), self.hidden_norm(hidden)]
    x = products.matmul(jnp.concatenate(x, axis=-1), self.merge[...])
    x, past, stats = self.block(self.cfg.residual.expand(x), ctx, past)
    return self.residual.collapse_normed(x, self.norm), past, stats

  def readout(self, state: jax.Array) -> jax.Array:
    """Returns what the head reads [B T D]: the state itself."""
    return state


class StreamMTP(nnx.Module):
  """Computes one depth over separate streams (V4); its state is the streams."""

  def __init__(
    self, block: BlockConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes the norms, two projections [D D] and the block."""
    norm = lambda: RMSNorm(dim, eps=block.norm_eps, rngs=rngs)
    init = nnx.initializers.normal(std)
    self.embed_norm, self.hidden_norm, self.norm = norm(), norm(), norm()
    self.embed_proj = param(rngs, init, (dim, dim), ('embed', None))
    self.hidden_proj = param(rngs, init, (dim, dim), ('embed', None))
    self.block = Block(block, dim, std=std, rngs=rngs)
    self.residual = block.residual.head(dim, std=std, rngs=rngs)

  def __call__(
    self,
    stream: jax.Array,
    embedded: jax.Array,
    ctx: Context,
    past: Any = None,
  ) -> tuple[jax.Array, Any, dict]:
    """Returns the streams [B T n D], the cache and the statistics of a depth.

    Args:
      stream: [B T n D], streams of the depth before.
      embedded: [B T D], embeddings of the tokens ahead.
      ctx: the context of those tokens, see `shifted`.
      past: the block's cache or None, as in MTP.
    """
    # [B T D] and [B T n D].
    e = products.matmul(self.embed_norm(embedded), self.embed_proj[...])
    x = products.matmul(self.hidden_norm(stream), self.hidden_proj[...])
    x, past, stats = self.block(e[:, :, None] + x, ctx, past)
    return x, past, stats

  def readout(self, stream: jax.Array) -> jax.Array:
    """Returns what the head reads [B T D] of the streams [B T n D]."""
    return self.residual.collapse_normed(stream, self.norm)


def shifted(ctx: Context, depth: int) -> Context:
  """Returns the context of `depth`: token i+depth takes the place of token i.

  Places with no such token in their document become padding, so they enter no
  load and no loss. Positions stay those of i.
  """
  T = ctx.tokens.shape[1]
  segments = ctx.segments
  if segments is None:
    segments = jnp.ones_like(ctx.tokens)
  # jnp.roll wraps around, so the last `depth` places are masked as well.
  same = jnp.roll(segments, -depth, axis=1) == segments
  inside = jnp.arange(T) < T - depth
  return ctx._replace(
    tokens=jnp.roll(ctx.tokens, -depth, axis=1),
    segments=jnp.where(same & inside, segments, 0),
  )
