"""Computes Engram: tables read by the hash of the last tokens.

See arXiv:2601.07372. A layer with an Engram looks up one row per n-gram order
and head, makes a value and, for each residual stream, a key of them, and adds
the value to the stream as far as key and stream agree. Tables grow without
costing FLOPs. Which rows are read is computed in ngram_hash.py. V4.1's Engram
has `conv` 0; neither form has biases here.
Legend: B batch, T tokens, n streams, D model, L layers with tables, N longest
n-gram, O = N - 1 orders, H tables of an order, K = O H, E width of a token's
rows together.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.config import above, at_least, within
from deepseek_jax.data import ngrams
from deepseek_jax.errors import InputError
from deepseek_jax.model import lookup
from deepseek_jax.model.attention import ring
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import products
from deepseek_jax.parallel.sharding import Buffer, param, shard

_ROWS = 128  # tables are filled up to a multiple, so that meshes divide them


@dataclasses.dataclass(frozen=True)
class EngramConfig:
  """Describes the Engram of all layers that have one.

  Attributes:
    base: rows of a table; the next unused prime from here on.
    longest: the longest n-gram N; there are tables for 2 to N tokens.
    heads: tables of an order H.
    dim: width of an order's rows together.
    conv: taps of a convolution over tokens, N apart; 0: none.
    classes: kinds of tokens V_c; 0: as many as there are tokens.
    seed: of the hash.
    norm_eps: of its norms.
    gate_floor: least agreement that the root in a gate is taken of.
  """

  base: int
  longest: int = 3
  heads: int = 8
  dim: int = 512
  conv: int = 4
  classes: int = 0
  seed: int = 0
  norm_eps: float = 1e-6
  gate_floor: float = 1e-6

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    at_least(self, 'engram.', base=2, longest=2, heads=1, dim=1)
    at_least(self, 'engram.', conv=0, classes=0, seed=0)
    above(self, 'engram.', norm_eps=0)
    # At 0 a root has no slope.
    within(self, 'engram.', gate_floor=(0, 1), ends='()')
    if self.conv == 1:
      raise InputError(
        'engram.conv = 1: one tap attends to no other token; use 0'
      )
    if self.dim % self.heads:
      raise InputError(
        f'engram.dim = {self.dim}: must be a multiple of heads = {self.heads}'
      )

  def sizes(self, layers: int) -> np.ndarray:
    """Returns the rows of every table, [L O H] int64 primes."""
    return ngrams.primes(self.base, layers, self.longest - 1, self.heads)

  def rows(self, layers: int) -> int:
    """Returns the rows of a layer's tables together, the same in all `layers`.

    Raises:
      InputError: more than int32 counts.
    """
    sizes = self.sizes(layers)
    most = int(sizes.reshape(layers, -1).sum(axis=1).max())
    rows = -(-most // _ROWS) * _ROWS
    if rows >= 2**31:
      raise InputError(
        f'engram.base = {self.base}: {rows} rows in a layer, int32 counts'
        ' fewer than 2^31; lower it'
      )
    return rows

  @property
  def width(self) -> int:
    """Returns E."""
    return (self.longest - 1) * self.dim

  @property
  def reach(self) -> int:
    """Returns how many tokens the convolution looks back."""
    return max(self.conv - 1, 0) * self.longest

  def cache(
    self,
    batch: int,
    streams: int,
    dim: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> jax.Array | None:
    """Returns a ring of the convolution's last inputs; None without one.

    Its shape is [B reach+1+spare n D]; it may be rewound by `spare` tokens.
    """
    if not self.reach:
      return None
    return jnp.zeros((batch, self.reach + 1 + spare, streams, dim), dtype)


def reaches(ctx: Context, back: int) -> jax.Array:
  """Returns whether the token `back` places before is of the same document.

  [B T] bool; with a cache it may lie in there.
  """
  inside = ctx.positions >= back
  if ctx.segments is None or back == 0:
    return inside
  beyond = jnp.arange(ctx.positions.shape[1]) < back  # in the cache, if at all
  same = jnp.roll(ctx.segments, back, axis=1) == ctx.segments
  return inside & (beyond | same)


def with_past(
  past: jax.Array | None, new: jax.Array, ctx: Context, reach: int
) -> jax.Array:
  """Returns new [B T ...] after the `reach` entries before it: [B reach+T ...].

  Args:
    past: a ring of at least reach + 1 slots, or None: then zeros stand before.
    new: entries of these tokens.
    ctx: the tokens.
    reach: how many entries.
  """
  if past is None:
    before = jnp.zeros((new.shape[0], reach, *new.shape[2:]), new.dtype)
  else:
    before = ring.unroll(past, ctx.positions[:, 0], reach + 1)
    before = before.astype(new.dtype)
  return jnp.concatenate([before, new], axis=1)


class Engram(nnx.Module):
  """Adds to the stream of one layer what its tables hold of the last tokens."""

  def __init__(
    self,
    cfg: EngramConfig,
    dim: int,
    *,
    streams: int,
    rows: int,
    std: float,
    rngs: nnx.Rngs,
  ):
    """Makes table, key, value, norm scales and, with taps, the convolution.

    Args:
      cfg: see there.
      dim: D.
      streams: n.
      rows: of the table.
      std: of the weights; the convolution starts at 0.
      rngs: random streams of `params`.
    """
    self.cfg = cfg
    E, n, D = cfg.width, streams, dim
    init = nnx.initializers.normal(std)
    self.table = param(
      rngs, init, (rows, cfg.dim // cfg.heads), ('tables', None)
    )
    self.key = param(rngs, init, (E, n, D), (None, 'streams', 'embed'))
    self.value = param(rngs, init, (E, D), (None, 'embed'))
    self.query_norm, self.key_norm = (self._scale(n * D, rngs) for _ in 'qk')
    if cfg.reach:
      self.conv_norm = self._scale(n * D, rngs)
      zeros = nnx.initializers.zeros
      self.conv = param(rngs, zeros, (cfg.conv, n, D), (None, None, None))
    # Which of the layers with an Engram this is; the Transformer sets it.
    self.number = Buffer(jnp.int32(0), axes=())

  @staticmethod
  def _scale(size: int, rngs: nnx.Rngs) -> nnx.Param:
    """Makes a norm's scale [size], float32 ones."""
    ones = nnx.initializers.ones
    return param(rngs, ones, (size,), (None,), full_precision=True)

  def _norm(self, x: jax.Array, scale: nnx.Param) -> jax.Array:
    """Normalises each stream of x [B T n D] by itself, in float32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean + self.cfg.norm_eps)
    return x * scale[...].astype(jnp.float32).reshape(x.shape[2:])

  def read(self, rows: jax.Array) -> jax.Array:
    """Returns the table's rows [B T K], side by side: [B T E]."""
    read = lookup.rows(self.table[...], rows)
    return read.reshape(*rows.shape[:2], self.cfg.width)

  def gates(self, stream: jax.Array, memory: jax.Array) -> jax.Array:
    """Computes how far each stream [B T n D] agrees with the rows [B T E].

    Returns:
      [B T n] float32, 0..1.
    """
    key = products.einsum('BTE,EnD->BTnD', memory, self.key[...])
    key = self._norm(key, self.key_norm)
    # A scaled dot product of the two, [B T n].
    agree = (key * self._norm(stream, self.query_norm)).sum(axis=-1)
    agree = agree * stream.shape[-1] ** -0.5
    # The square root spreads what is near 0, where random pairs lie.
    root = jnp.sqrt(jnp.maximum(jnp.abs(agree), self.cfg.gate_floor))
    return jax.nn.sigmoid(jnp.sign(agree) * root)

  def mixed(
    self, x: jax.Array, ctx: Context, past: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Convolves each channel of x [B T n D] over tokens, N apart.

    Args:
      x: what the gates let through.
      ctx: the tokens.
      past: the ring of inputs, or None.

    Returns:
      [B T n D] float32, and the ring with these tokens.
    """
    x = self._norm(x, self.conv_norm).astype(x.dtype)
    reach, N, T = self.cfg.reach, self.cfg.longest, x.shape[1]
    joined = with_past(past, x, ctx, reach)
    y = jnp.zeros(x.shape, jnp.float32)
    for k in range(self.cfg.conv):
      tap = joined[:, reach - N * k :][:, :T]
      # No tap reaches into the document before.
      seen = reaches(ctx, N * k)[..., None, None]
      y += jnp.where(seen, tap, 0) * self.conv[k]
    if past is not None:
      past = ring.write(past, x, ctx.positions, ctx.valid)
    return jax.nn.silu(y), past

  def __call__(
    self, stream: jax.Array, ctx: Context, past: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns the stream with the Engram's values added, and the cache.

    Args:
      stream: [B T D] or [B T n D].
      ctx: the tokens; ctx.rows holds the rows that this layer reads.
      past: as `EngramConfig.cache` makes it, or None.

    Raises:
      InputError: the n-grams were not hashed.
    """
    if ctx.rows is None:
      raise InputError(
        'engram: the rows of these n-grams were not hashed; call the whole'
        ' model, as stages of a pipeline do not hash'
      )
    x = stream if stream.ndim == 4 else stream[:, :, None]  # [B T n D]
    rows = jnp.take(ctx.rows, self.number[...], axis=2)  # [B T K]
    if ctx.valid is not None:  # padding may hold anything
      rows = jnp.where(ctx.valid[..., None], rows, 0)
    memory = shard(self.read(rows), 'batch', 'seq', None)
    value = products.matmul(memory, self.value[...])  # [B T D]
    # One value for all streams, gated for each: [B T n D].
    y = self.gates(x, memory)[..., None] * value[:, :, None]
    y = y.astype(stream.dtype)
    if self.cfg.reach:
      more, past = self.mixed(y, ctx, past)
      y = y + more.astype(y.dtype)
    return stream + y.reshape(stream.shape), past
