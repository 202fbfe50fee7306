"""Computes manifold-constrained hyper-connections, mHC (arXiv:2512.24880).

See also DeepSeek-V4, section 2. The residual stream is n streams. A sublayer
reads a weighted sum of them (`pre`), adds its output to each with a weight
(`post`), and between the two the streams are mixed by a matrix whose rows and
columns sum to one (`comb`, by Sinkhorn's alternating divisions). All three
depend on the token.
Legend: B batch, T tokens, n streams, D model, M = n (n + 2) maps.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config import above, at_least, finite
from deepseek_jax.model import kernels
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.residual import Residual
from deepseek_jax.parallel.sharding import param
from pallas_kernels.collapse_norm import collapse_norm
from pallas_kernels.sinkhorn import sinkhorn
from pallas_kernels.write_streams import write_streams


@dataclasses.dataclass(frozen=True)
class HyperConnectionsConfig:
  """Describes how many streams there are, and how they are mixed.

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
    """Raises InputError for a field out of its range."""
    at_least(self, 'residual.', streams=1, iterations=1)
    above(self, 'residual.', eps=0, norm_eps=0)
    finite(self, 'alpha', 'diagonal', prefix='residual.')

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> Residual:
    """Returns the connection of one sublayer."""
    return HyperConnection(self, dim, std=std, rngs=rngs)

  def head(self, dim: int, *, std: float, rngs: nnx.Rngs) -> Residual:
    """Returns the module that collapses the streams after the last block."""
    return HyperHead(self, dim, std=std, rngs=rngs)

  def expand(self, x: jax.Array) -> jax.Array:
    """Copies the embedding [B T D] to each stream: [B T n D]."""
    return jnp.repeat(x[:, :, None], self.streams, axis=2)


def _mixes(stream: jax.Array, fn: jax.Array, eps: float) -> jax.Array:
  """Computes the products of a token's streams, normed together, with fn.

  Args:
    stream: [B T n D].
    fn: [n D M].
    eps: of the norm.

  Returns:
    [B T M] float32.
  """
  x = stream.astype(jnp.float32)
  mix = jnp.einsum(
    'BTnD,nDM->BTM', x, fn.astype(jnp.float32), precision='highest'
  )
  # The norm has no weights, so it may as well be taken after the product.
  return mix * jax.lax.rsqrt(jnp.mean(x * x, axis=(2, 3))[..., None] + eps)


def _collapse(stream: jax.Array, pre: jax.Array) -> jax.Array:
  """Returns the sum of streams [B T n D] weighted by pre [B T n]: [B T D]."""
  x = jnp.einsum('BTnD,BTn->BTD', stream.astype(jnp.float32), pre)
  return x.astype(stream.dtype)


def _collapse_normed(
  stream: jax.Array, pre: jax.Array, norm: RMSNorm
) -> jax.Array:
  """Returns norm of the weighted sum of streams, [B T D]."""

  def fused(
    impl: str, stream: jax.Array, pre: jax.Array, gain: jax.Array
  ) -> jax.Array:
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    y = collapse_norm(flat(stream), flat(pre), gain, eps=norm.eps, impl=impl)
    return y.reshape(*stream.shape[:2], -1)

  token = ('batch', 'seq')
  return kernels.pick(
    'collapse_norm',
    fused,
    lambda: norm(_collapse(stream, pre)),
    (stream, pre, norm.scale[...]),
    (token, token, ()),
    token,
  )


def _fn(
  rngs: nnx.Rngs, cfg: HyperConnectionsConfig, dim: int, maps: int, std: float
) -> nnx.Param:
  """Makes the float32 weight [n D maps] of the products."""
  init = nnx.initializers.normal(std)
  shape, axes = (cfg.streams, dim, maps), (None, 'embed', None)
  return param(rngs, init, shape, axes, full_precision=True)


def _constant(rngs: nnx.Rngs, value: np.ndarray) -> nnx.Param:
  """Makes a float32 parameter that starts as `value`, a vector."""
  value = np.asarray(value, np.float32)
  init = lambda key, shape, dtype: jnp.asarray(value, dtype)
  return param(rngs, init, value.shape, (None,), full_precision=True)


def maps(
  mix: jax.Array, scale: jax.Array, base: jax.Array, cfg: HyperConnectionsConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns pre [... n], post [... n] and comb [... n n], float32.

  comb[j, k] is how much of stream j goes to stream k.

  Args:
    mix: [... M] float32, products of the streams.
    scale: [3] of pre, post and comb.
    base: [M], added to them.
    cfg: see there.
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
  def mixed(impl: str, comb: jax.Array) -> jax.Array:
    how = {'iterations': cfg.iterations, 'eps': cfg.eps, 'impl': impl}
    flat = sinkhorn(comb.reshape(-1, n, n), **how)
    return flat.reshape(*comb.shape[:-1], n, n)

  token = ('batch', 'seq')[: mix.ndim - 1]
  comb = kernels.pick(
    'sinkhorn',
    mixed,
    lambda: mixed('reference', comb),
    (comb,),
    (token,),
    token,
  )
  # pre lies in eps..1 + eps, post in 0..2: at a logit of 0 it is 1, as in the
  # plain residual.
  return jax.nn.sigmoid(pre) + cfg.eps, 2 * jax.nn.sigmoid(post), comb


class HyperConnection(Residual):
  """Connects one sublayer to n streams."""

  def __init__(
    self, cfg: HyperConnectionsConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes fn [n D M] and the scales and biases of the maps."""
    self.cfg = cfg
    n = cfg.streams
    self.fn = _fn(rngs, cfg, dim, n * (n + 2), std)
    # pre and post start from logits of 0; comb favours its diagonal.
    comb = cfg.diagonal * np.eye(n).reshape(-1)
    self.base = _constant(rngs, np.concatenate([np.zeros(2 * n), comb]))
    self.scale = _constant(rngs, np.full(3, cfg.alpha))

  def read(
    self, stream: jax.Array
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the sublayer's input [B T D], and (post, comb) for `write`.

    Args:
      stream: [B T n D].
    """
    pre, *how = self._maps(stream)
    return _collapse(stream, pre), tuple(how)

  def read_normed(
    self, stream: jax.Array, norm: RMSNorm
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns norm of what `read` returns, and (post, comb)."""
    pre, *how = self._maps(stream)
    return _collapse_normed(stream, pre, norm), tuple(how)

  def _maps(self, stream: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns pre, post and comb of the tokens' streams [B T n D]."""
    mix = _mixes(stream, self.fn[...], self.cfg.norm_eps)  # [B T M]
    return maps(mix, self.scale[...], self.base[...], self.cfg)

  def write(
    self, stream: jax.Array, y: jax.Array, how: tuple[jax.Array, jax.Array]
  ) -> jax.Array:
    """Mixes the streams [B T n D] and adds y [B T D] to each by its weight."""
    post, comb = how

    def own() -> jax.Array:
      # float32: a sum over n streams, rounded once.
      f32 = jnp.float32
      mixed = jnp.einsum('BTjD,BTjk->BTkD', stream.astype(f32), comb)
      added = post[..., None] * y[:, :, None].astype(f32)
      return (mixed + added).astype(stream.dtype)

    def fused(impl: str, *args: jax.Array) -> jax.Array:
      flat = lambda a: a.reshape(-1, *a.shape[2:])
      new = write_streams(*map(flat, args), impl=impl)
      return new.reshape(args[0].shape)

    token = ('batch', 'seq')
    args = stream, y.astype(stream.dtype), post, comb
    return kernels.pick('write_streams', fused, own, args, (token,) * 4, token)


class HyperHead(Residual):
  """Collapses the streams after the last block: pre alone, with own weights."""

  def __init__(
    self, cfg: HyperConnectionsConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes fn [n D n], one scale and n biases."""
    self.cfg = cfg
    self.fn = _fn(rngs, cfg, dim, cfg.streams, std)
    self.base = _constant(rngs, np.zeros(cfg.streams))
    self.scale = _constant(rngs, np.full(1, cfg.alpha))

  def collapse(self, stream: jax.Array) -> jax.Array:
    """Returns the weighted sum of the streams [B T n D]: [B T D]."""
    return _collapse(stream, self._pre(stream))

  def collapse_normed(self, stream: jax.Array, norm: RMSNorm) -> jax.Array:
    """Returns norm of what `collapse` returns."""
    return _collapse_normed(stream, self._pre(stream), norm)

  def _pre(self, stream: jax.Array) -> jax.Array:
    """Returns the weights [B T n] of the tokens' streams."""
    mix = _mixes(stream, self.fn[...], self.cfg.norm_eps)  # [B T n]
    pre = jax.nn.sigmoid(mix * self.scale[...] + self.base[...])
    return pre + self.cfg.eps
