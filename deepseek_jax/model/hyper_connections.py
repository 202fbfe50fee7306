"""Manifold-constrained hyper-connections, mHC (arXiv:2512.24880; V4 section 2).

The residual stream is n streams. A sublayer reads a weighted sum of them
(`pre`), adds its output to each with a weight (`post`), and between the two
the streams are mixed by a matrix whose rows and columns sum to one (`comb`,
by Sinkhorn's alternating divisions). All three depend on the token.
Legend: B batch, T tokens, n streams, D model, M = n (n + 2) maps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config import above, at_least, finite
from deepseek_jax.model import kernels
from deepseek_jax.model.residual import Residual
from deepseek_jax.parallel.sharding import param
from pallas_kernels.sinkhorn import sinkhorn


@dataclasses.dataclass(frozen=True)
class HyperConnectionsConfig:
  """How many streams, and how they are mixed.

  Attributes:
    streams: n.
    iterations: divisions by the column sums (hc_sinkhorn_iters).
    eps: added to the gates of reading and to every sum (hc_eps).
    norm_eps: of the norm over all streams, whose weights are fixed at one.
    alpha: initial scale of what depends on the token (mHC table 5).
    diagonal: initial logit by which a stream favours itself. All streams
      start as copies of the embedding: without it and with a small alpha
      they would stay nearly equal. The papers leave this one open.
  """

  streams: int = 4
  iterations: int = 20
  eps: float = 1e-6
  norm_eps: float = 1e-6
  alpha: float = 0.01
  diagonal: float = 1.0

  def __post_init__(self):
    at_least(self, 'residual.', streams=1, iterations=1)
    above(self, 'residual.', eps=0, norm_eps=0)
    finite(self, 'alpha', 'diagonal', prefix='residual.')

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> Residual:
    """The connection of one sublayer."""
    return HyperConnection(self, dim, std=std, rngs=rngs)

  def head(self, dim: int, *, std: float, rngs: nnx.Rngs) -> Residual:
    """What makes one stream of all after the last block."""
    return HyperHead(self, dim, std=std, rngs=rngs)

  def expand(self, x: jax.Array) -> jax.Array:
    """Embedding [B T D] -> [B T n D], a copy in each stream."""
    return jnp.repeat(x[:, :, None], self.streams, axis=2)


def _mixes(stream, fn, eps):
  """All streams of a token, normed together, times fn: -> [B T M] float32."""
  x = stream.astype(jnp.float32)
  mix = jnp.einsum(
    'BTnD,nDM->BTM', x, fn.astype(jnp.float32), precision='highest'
  )
  # The norm has no weights, so it may as well be taken after the product.
  return mix * jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3))[..., None] + eps)


def _collapse(stream, pre):
  """Weighted sum of streams [B T n D] by pre [B T n] -> [B T D]."""
  x = jnp.einsum('BTnD,BTn->BTD', stream.astype(jnp.float32), pre)
  return x.astype(stream.dtype)


def _fn(rngs, cfg, dim, maps, std):
  init = nnx.initializers.normal(std)
  shape, axes = (cfg.streams, dim, maps), (None, 'embed', None)
  return param(rngs, init, shape, axes, full_precision=True)


def _constant(rngs, value):
  value = np.asarray(value, np.float32)
  init = lambda key, shape, dtype: jnp.asarray(value, dtype)
  return param(rngs, init, value.shape, (None,), full_precision=True)


def maps(
  mix: jax.Array, scale: jax.Array, base: jax.Array, cfg: HyperConnectionsConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Products [... M] -> pre [... n], post [... n], comb [... n n], float32.

  comb[j, k] is how much of stream j goes to stream k.
  """
  n = cfg.streams
  cuts = [n, 2 * n]
  pre, post, comb = (
    part * scale[i] + b
    for i, (part, b) in enumerate(
      zip(jnp.split(mix, cuts, axis=-1), jnp.split(base, cuts))
    )
  )
  # The op takes rows first and ends on columns, as the checkpoints do.
  mixed = functools.partial(
    sinkhorn,
    comb.reshape(-1, n, n),
    iterations=cfg.iterations,
    eps=cfg.eps,
  )
  comb = kernels.pick(
    'sinkhorn',
    lambda impl: mixed(impl=impl),
    lambda: mixed(impl='reference'),
  )
  comb = comb.reshape(*mix.shape[:-1], n, n)
  return jax.nn.sigmoid(pre) + cfg.eps, 2 * jax.nn.sigmoid(post), comb


class HyperConnection(Residual):
  """How one sublayer reads n streams and writes to them."""

  def __init__(
    self, cfg: HyperConnectionsConfig, dim: int, *, std, rngs: nnx.Rngs
  ):
    self.cfg = cfg
    n = cfg.streams
    self.fn = _fn(rngs, cfg, dim, n * (n + 2), std)
    comb = cfg.diagonal * np.eye(n).reshape(-1)
    self.base = _constant(rngs, np.concatenate([np.zeros(2 * n), comb]))
    self.scale = _constant(rngs, np.full(3, cfg.alpha))

  def read(self, stream: jax.Array):
    """[B T n D] -> (the sublayer's input [B T D], its post and comb)."""
    mix = _mixes(stream, self.fn[...], self.cfg.norm_eps)
    pre, post, comb = maps(mix, self.scale[...], self.base[...], self.cfg)
    return _collapse(stream, pre), (post, comb)

  def write(self, stream: jax.Array, y: jax.Array, how) -> jax.Array:
    """Streams [B T n D] mixed, with y [B T D] added to each by its weight."""
    post, comb = how
    f32 = jnp.float32
    mixed = jnp.einsum('BTjD,BTjk->BTkD', stream.astype(f32), comb)
    added = post[..., None] * y[:, :, None].astype(f32)
    return (mixed + added).astype(stream.dtype)


class HyperHead(Residual):
  """The last reading: pre alone, with weights of its own."""

  def __init__(
    self, cfg: HyperConnectionsConfig, dim: int, *, std, rngs: nnx.Rngs
  ):
    self.cfg = cfg
    self.fn = _fn(rngs, cfg, dim, cfg.streams, std)
    self.base = _constant(rngs, np.zeros(cfg.streams))
    self.scale = _constant(rngs, np.full(1, cfg.alpha))

  def collapse(self, stream: jax.Array) -> jax.Array:
    """[B T n D] -> [B T D]."""
    mix = _mixes(stream, self.fn[...], self.cfg.norm_eps)
    pre = jax.nn.sigmoid(mix * self.scale[...] + self.base[...])
    return _collapse(stream, pre + self.cfg.eps)
