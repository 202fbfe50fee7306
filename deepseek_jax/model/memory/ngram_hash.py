"""Hashes n-grams on the device: tokens -> rows of Engram's tables.

The data pipeline hashes ahead on the host (data/ngrams.py, int64). Sampling
and evaluation have no pipeline before them and hash here, where JAX has no
int64: products are pairs of uint32, remainders are taken by long division, and
the rows are the same to the bit. So one model serves both.
Legend: B batch, T tokens, V vocabulary, L layers with tables, N longest n-gram,
O = N - 1 orders, H tables of an order, K = O H.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.data import ngrams
from deepseek_jax.errors import InputError
from deepseek_jax.model import lookup
from deepseek_jax.model.attention import ring
from deepseek_jax.model.context import Context
from deepseek_jax.model.memory.engram import EngramConfig, reaches, with_past
from deepseek_jax.parallel.sharding import Buffer


def _times(
  a: jax.Array, high: jax.Array, low: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Multiplies a uint32 by a 63-bit number, modulo 2^64.

  Args:
    a: uint32.
    high, low: uint32, the halves of the other factor.

  Returns:
    The product's halves (high, low), uint32.
  """
  half = jnp.uint32(0xFFFF)
  # Schoolbook multiplication of 16-bit digits: no partial product overflows.
  a0, a1, b0, b1 = a & half, a >> 16, low & half, low >> 16
  middle = (a0 * b0 >> 16) + (a0 * b1 & half) + (a1 * b0 & half)
  carried = a1 * b1 + (a0 * b1 >> 16) + (a1 * b0 >> 16) + (middle >> 16)
  return carried + a * high, middle << 16 | a0 * b0 & half


def _remainder(
  high: jax.Array, low: jax.Array, primes: jax.Array, bits: int
) -> jax.Array:
  """Returns (high, low) as one number modulo primes of at most `bits` bits."""
  step = 32 - bits  # digits of the long division that fit beside a remainder
  left = high % primes
  for start in range(32, 0, -step):
    take = min(step, start)
    digits = low >> (start - take) & jnp.uint32((1 << take) - 1)
    left = (left << take | digits) % primes
  return left


def rows_on_device(
  window: jax.Array, multipliers: jax.Array, primes: jax.Array, bits: int
) -> jax.Array:
  """Computes what ngrams.rows does, without 64-bit integers.

  Args:
    window: [B T N] int32, classes of the last tokens.
    multipliers: [L N 2] uint32, high and low halves.
    primes: [L O H] int32, below 2^31.
    bits: of the largest prime.

  Returns:
    [B T L K] int32.
  """
  L, O, H = primes.shape
  sizes = primes.astype(jnp.uint32)
  flat = sizes.reshape(L, -1)
  # A layer's tables lie one after the other in one table.
  first = (jnp.cumsum(flat, axis=1, dtype=jnp.uint32) - flat).reshape(L, O, H)
  window = window.astype(jnp.uint32)[..., None, :]  # [B T 1 N]
  high, low = _times(window, multipliers[..., 0], multipliers[..., 1])
  parts, mixed = [], (high[..., 0], low[..., 0])
  for k in range(1, O + 1):
    # The hash of k + 1 tokens is that of k tokens, xor one more product.
    mixed = mixed[0] ^ high[..., k], mixed[1] ^ low[..., k]
    left = _remainder(
      *(m[..., None] for m in mixed), sizes[:, k - 1], bits
    )  # [B T L H]
    parts.append(left + first[:, k - 1])
  return jnp.concatenate(parts, axis=-1).astype(jnp.int32)


class NGramHash(nnx.Module):
  """Maps tokens to rows, for all layers at once; nothing of it is trained."""

  def __init__(
    self, cfg: EngramConfig, vocab_size: int, layers: tuple[int, ...]
  ):
    """Draws the multipliers and finds the primes of `layers`.

    Args:
      cfg: see there.
      vocab_size: V.
      layers: numbers of the layers with an Engram.
    """
    self.cfg = cfg
    sizes = cfg.sizes(len(layers))
    self.bits = int(sizes.max()).bit_length()
    drawn = ngrams.multipliers(
      layers, cfg.longest, cfg.classes or vocab_size, cfg.seed
    )
    halves = np.stack([drawn >> 32, drawn & 0xFFFFFFFF], axis=-1)
    make = lambda a, dtype: Buffer(jnp.asarray(a, dtype), axes=(None,) * a.ndim)
    self.classes = make(np.arange(vocab_size), jnp.int32)
    self.multipliers = make(halves.astype(np.uint32), jnp.uint32)
    self.primes = make(sizes, jnp.int32)

  def __call__(
    self, ctx: Context, past: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns rows [B T L K] of ctx.tokens, and the ring with their classes.

    An n-gram with a number that is no token has the row -1, which no table has.

    Args:
      ctx: the tokens. Those that `ctx.before` holds, [B N-1] in order, come
        before them; where it has none, those in `past`.
      past: [B R] int32, a ring of the last tokens' classes, R >= N, or None.
    """
    N = self.cfg.longest
    classed = lambda tokens: lookup.rows(self.classes[...], tokens, fill=-1)
    classes = classed(ctx.tokens)
    if ctx.before is None:
      joined = with_past(past, classes, ctx, N - 1)
    else:
      joined = jnp.concatenate([classed(ctx.before), classes], axis=1)
    T = classes.shape[1]
    # Places before the document's start hold PAD: [B T N], last token first.
    window = jnp.stack(
      [
        jnp.where(reaches(ctx, k), joined[:, N - 1 - k :][:, :T], ngrams.PAD)
        for k in range(N)
      ],
      axis=-1,
    )
    if past is not None:
      past = ring.write(past, classes, ctx.positions, ctx.valid)
    rows = rows_on_device(
      window, self.multipliers[...], self.primes[...], self.bits
    )
    whole = (window >= 0).all(axis=-1)[..., None, None]
    return jnp.where(whole, rows, -1), past


def host_hash(buffers: dict) -> ngrams.NGrams:
  """Returns the same hash for the data pipeline, from a model's buffers."""
  part = {k: np.asarray(v) for k, v in buffers['ngrams'].items()}
  high, low = np.moveaxis(part['multipliers'].astype(np.int64), -1, 0)
  how = ngrams.Hash(high << 32 | low, part['primes'].astype(np.int64))
  return ngrams.NGrams(part['classes'], how)


def with_classes(cfg: EngramConfig, buffers: dict, classes: np.ndarray) -> dict:
  """Returns a model's buffers with the classes [V] of its tokenizer's tokens.

  Raises:
    InputError: more classes than `cfg.classes`.
  """
  kinds = int(classes.max()) + 1
  if cfg.classes and kinds > cfg.classes:
    raise InputError(
      f'engram.classes = {cfg.classes}: the tokenizer has {kinds}; set it to'
      ' that, or to 0'
    )
  old = buffers['ngrams']['classes']
  new = jax.device_put(np.asarray(classes, np.int32), old.sharding)
  return {**buffers, 'ngrams': {**buffers['ngrams'], 'classes': new}}
