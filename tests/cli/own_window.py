"""An experiment file as a user has it: a sliding window, and a router.

Tests copy it out of the repository; a launcher loads the copy by --config.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.config import at_least
from deepseek_jax.model import cache as caching
from deepseek_jax.model.attention.gqa import GQA, GQAConfig, KeyValue
from deepseek_jax.model.attention.rope import rope
from deepseek_jax.model.experts.router import RouterConfig, choose, routing
from deepseek_jax.parallel.sharding import Buffer, param


@dataclasses.dataclass(frozen=True)
class WindowConfig(GQAConfig):
  """Grouped-query attention to the last `window` tokens."""

  window: int = 4

  def __post_init__(self):
    super().__post_init__()
    at_least(self, window=1)

  def build(self, dim, *, std, rngs):
    return Window(self, dim, std=std, rngs=rngs)


class Window(GQA):
  def __call__(self, x, ctx, past=None):
    q, k, v = self.projections(x)
    q, k = (rope(a, ctx.positions, self.cfg.rope) for a in (q, k))
    keys, at = KeyValue(k, v), ctx.positions
    if past is not None:
      pairs = zip(past, keys)
      past = KeyValue(
        *(caching.write(b, n, ctx.positions, ctx.valid) for b, n in pairs)
      )
    if past is not None and not ctx.fresh:
      keys, at = past, jnp.arange(past.k.shape[1])[None]
    back = ctx.positions[:, :, None] - at[:, None, :]
    seen = (back >= 0) & (back < self.cfg.window)  # [B T S]
    if ctx.segments is not None and keys.k is k:
      seen &= ctx.segments[:, :, None] == ctx.segments[:, None, :]
    each = self.cfg.heads // self.cfg.kv_heads
    k, v = (jnp.repeat(a, each, axis=2) for a in keys)
    scores = jnp.einsum('BTHK,BSHK->BHTS', q, k) * self.cfg.scale
    p = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    y = jnp.einsum('BHTS,BSHK->BTHK', p, v)
    return jnp.einsum('BTHK,HKD->BTD', y, self.out[...]), past, {}


@dataclasses.dataclass(frozen=True)
class SquareConfig:
  """A router whose scores are the squared logits, plus `floor`."""

  floor: float = 0.1

  def check(self, experts, top_k):
    """Any number of experts fits."""

  def build(self, dim, *, experts, top_k, std, rngs):
    return Square(self, dim, experts, top_k, std=std, rngs=rngs)


class Square(nnx.Module):
  def __init__(self, cfg, dim, experts, top_k, *, std, rngs):
    self.cfg, self.top_k = cfg, top_k
    init = nnx.initializers.normal(std)
    self.weight = param(rngs, init, (dim, experts), ('embed', None))
    self.bias = Buffer(jnp.zeros(experts, jnp.float32), axes=(None,))

  def __call__(self, x, ctx):
    logits = (x @ self.weight[...]).astype(jnp.float32)
    scores = logits**2 + self.cfg.floor
    chosen = choose(scores, self.bias[...], self.top_k, RouterConfig())
    return routing(*chosen, scores, ctx.valid)


def get_config() -> ds.RunConfig:
  return ds.changed(
    ds.recipes.v3_tiny(),
    {
      'model.attention': WindowConfig(2, 1, 8),
      'model.moe.router': SquareConfig(),
      'model.vocab_size': 261,
      'model.dim': 16,
      'model.layout': ((('dense', 'moe'), 1),),
      'model.ffn.width': 16,
      'model.moe.width': 8,
      'model.moe.experts': 4,
      'model.moe.top_k': 2,
      'model.mtp.depth': 0,
      'data.tokenizer': 'bytes',
      'data.vocab_size': 261,
      'data.seq_len': 16,
      'data.heldout_fraction': 0.0,
      'train.tokens': 64,
      'train.batch.size': 2,
      'evaluate.every': 0,
      'checkpoint_every': 1,
    },
  )
