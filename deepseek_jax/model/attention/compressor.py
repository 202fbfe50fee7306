"""Compresses m tokens into one key-value entry (DeepSeek-V4 section 2.3).

A softmax over the tokens of a window, taken for each channel by itself, weighs
their projections; a learned bias marks places in the window. With overlap an
entry draws on the window before, too, through a second series of projections.
Documents are compressed each from its own start; the tokens after the last
whole window wait until it is full, and no entry is made of them.
Legend: B batch, T tokens, L tokens with those before, S entries, m ratio,
J series (2 with overlap: window before, own window), C entry dim, R = J m.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.model import cache as caching
from deepseek_jax.model import kernels
from deepseek_jax.model.attention import ring
from deepseek_jax.model.attention.rope import RopeConfig, rope
from deepseek_jax.model.context import Context
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel.sequence import WHOLE, Along, in_a_row
from deepseek_jax.parallel.sharding import param
from pallas_kernels.compress import compress, reference


@dataclasses.dataclass(frozen=True)
class CompressorConfig:
  """Describes a compressor; the layer makes it of its own configuration.

  Attributes:
    ratio: m.
    overlap: whether an entry draws on the window before, too.
    dim: C.
    rope_dim: channels that are rotated, the last ones.
    rope: of these channels.
    norm_eps: of the norm of entries.
  """

  ratio: int
  overlap: bool
  dim: int
  rope_dim: int
  rope: RopeConfig
  norm_eps: float

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'compressor.', ratio=1, dim=1, rope_dim=1)
    above(self, 'compressor.', norm_eps=0)

  @property
  def series(self) -> int:
    """Returns J."""
    return 2 if self.overlap else 1

  @property
  def reach(self) -> int:
    """Returns R, how many tokens an entry draws on."""
    return self.series * self.ratio

  def cache(
    self,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> 'Compressed':
    """Returns an empty cache: C numbers per m slots, and a remainder.

    The remainder has `spare` more slots, by so many tokens it may be rewound.
    """
    # A ring of the last tokens, which later entries may draw on.
    waiting = (batch, self.reach + spare, self.series, self.dim)
    return Compressed(
      jnp.zeros((batch, max(1, slots // self.ratio), self.dim), dtype),
      jnp.zeros(waiting, jnp.float32),
      jnp.zeros(waiting, jnp.float32),
    )


class Compressed(NamedTuple):
  """Holds the entries so far, and a ring of the last tokens' projections.

  R is at least the compressor's `reach`.
  """

  entries: jax.Array  # [B S C]
  kv: jax.Array  # [B R J C] float32
  gate: jax.Array  # [B R J C] float32


class View(NamedTuple):
  """Holds which entries each query attends to: `count` from `first` on."""

  first: jax.Array  # [B T] int32
  count: jax.Array  # [B T] int32, floor((t + 1) / m) at position t

  def mask(self, entries: int) -> jax.Array:
    """Returns which entries each query attends to, [B T S] bool."""
    at = jnp.arange(entries)
    first, count = self.first[..., None], self.count[..., None]
    return (at >= first) & (at < first + count)


def tail_rope(
  x: jax.Array, positions: jax.Array, cfg: RopeConfig, dim: int
) -> jax.Array:
  """Rotates the last `dim` channels of x [B T ... C] to positions [B T]."""
  rest, last = jnp.split(x, [x.shape[-1] - dim], axis=-1)
  return jnp.concatenate([rest, rope(last, positions, cfg)], axis=-1)


def _segments(ctx: Context) -> jax.Array:
  """Returns the documents of the tokens, [B T] int32; without any all are 1."""
  if ctx.segments is None:
    return jnp.ones_like(ctx.positions)
  return ctx.segments


def window_ends(
  positions: jax.Array, segments: jax.Array, ratio: int
) -> jax.Array:
  """Returns whether a document's whole window ends at a token, [B L] bool."""
  L = positions.shape[1]
  back = lambda a, n: jnp.pad(a, [(0, 0), (n, 0)], constant_values=-1)[:, :L]
  # The token m - 1 places before is of the same document ...
  whole = back(segments, ratio - 1) == segments
  # ... and no token between them is missing.
  whole &= back(positions, ratio - 1) == positions - (ratio - 1)
  at_end = (positions + 1) % ratio == 0
  return whole & at_end & (segments > 0) & (jnp.arange(L) >= ratio - 1)


def view(ctx: Context, ratio: int, fresh: bool) -> View:
  """Returns which entries each token attends to: the batch's or the cache's."""
  if fresh:
    return fresh_view(ctx.positions, _segments(ctx), ratio)
  count = (ctx.positions + 1) // ratio
  return View(jnp.zeros_like(count), count)


def fresh_view(
  positions: jax.Array, segments: jax.Array, ratio: int, along: Along = WHOLE
) -> View:
  """Returns which entries of all tokens the local tokens attend to.

  Args:
    positions, segments: [B T] of the local tokens.
    ratio: m.
    along: the local shard of sequences.
  """
  positions, segments = along.gather((positions, segments))
  ends = window_ends(positions, segments, ratio).astype(jnp.int32)
  so_far = jnp.cumsum(ends, axis=1)
  new = segments[:, 1:] != segments[:, :-1]
  new |= positions[:, 1:] != positions[:, :-1] + 1
  new = jnp.pad(new, [(0, 0), (1, 0)], constant_values=True)
  # Entries of all documents lie one after the other.
  first = jax.lax.cummax(jnp.where(new, so_far - ends, 0), axis=1)
  return along.own(View(first, jnp.where(segments > 0, so_far - first, 0)))


class Tokens(NamedTuple):
  """Holds projections of the tokens that entries may draw on."""

  kv: jax.Array  # [B L J C] float32
  gate: jax.Array  # [B L J C] float32
  positions: jax.Array  # [B L]
  segments: jax.Array  # [B L]


class Compressor(nnx.Module):
  """Makes entries of tokens, and keeps the tokens that wait in the cache."""

  def __init__(
    self, cfg: CompressorConfig, dim: int, *, std: float, rngs: nnx.Rngs
  ):
    """Makes projections and gates [D J C], the bias [m J C] and the norm."""
    self.cfg = cfg
    D, J, C = dim, cfg.series, cfg.dim
    init, zeros = nnx.initializers.normal(std), nnx.initializers.zeros
    axes = ('embed', 'series', None)
    self.kv = param(rngs, init, (D, J, C), axes)
    self.gate = param(rngs, init, (D, J, C), axes)
    self.bias = param(
      rngs, zeros, (cfg.ratio, J * C), (None, None), full_precision=True
    )
    self.norm = RMSNorm(C, eps=cfg.norm_eps, rngs=rngs)

  def __call__(
    self, x: jax.Array, ctx: Context, past: Compressed | None
  ) -> tuple[jax.Array, Compressed | None]:
    """Returns the entries [B S C], and the cache with the tokens of x [B T D].

    The entries are those of a fresh batch's documents, one after the other
    (see `view`), or all that the cache holds.
    """
    own = self.tokens(x, ctx)
    T, m = x.shape[1], self.cfg.ratio
    if past is None or ctx.fresh:
      made, at = complete(self.cfg, self.weights(), own, max(1, T // m))
    else:
      # Entries that end in these tokens may begin in cached ones.
      tokens = _after(self.cfg, past, own)
      made, at = complete(self.cfg, self.weights(), tokens, -(-T // m), T)
    made = made.astype(x.dtype)
    if past is None:
      return made, None
    # The entry of positions n m .. n m + m - 1 lies in slot n.
    entries = caching.write(past.entries, made, at // m, at >= 0)
    write = lambda a, new: ring.write(a, new, ctx.positions, ctx.valid)
    past = Compressed(
      entries, write(past.kv, own.kv), write(past.gate, own.gate)
    )
    return made if ctx.fresh else entries, past

  def tokens(self, x: jax.Array, ctx: Context) -> Tokens:
    """Projects x [B T D] to what entries draw on."""
    f32 = {'preferred_element_type': jnp.float32}
    kv = jnp.einsum('BTD,DJC->BTJC', x, self.kv[...], **f32)
    gate = jnp.einsum('BTD,DJC->BTJC', x, self.gate[...], **f32)
    # A caller's NumPy arrays can't be indexed by traced numbers.
    where = map(jnp.asarray, (ctx.positions, _segments(ctx)))
    return Tokens(kv, gate, *where)

  def weights(self) -> tuple[jax.Array, RMSNorm]:
    """Returns the other weights of entries: the bias [m J C] and the norm."""
    shape = self.cfg.ratio, self.cfg.series, self.cfg.dim
    return self.bias[...].reshape(shape), self.norm


def complete(
  cfg: CompressorConfig,
  weights: tuple[jax.Array, RMSNorm],
  tokens: Tokens,
  count: int,
  new: int = 0,
) -> tuple[jax.Array, jax.Array]:
  """Makes the entries of windows that end in the last `new` tokens, or in any.

  Args:
    cfg: of the compressor; weights: its `weights`.
    tokens: L of them.
    count: S, how many entries at most.
    new: see above; 0 is all.

  Returns:
    [B S C] float32, and the positions where their windows start [B S]; -1 is
    no entry.
  """
  m = cfg.ratio
  ends = window_ends(tokens.positions, tokens.segments, m)
  (B, L), whole = ends.shape, ends
  if new:
    ends &= jnp.arange(L) >= L - new
  # Entries in order; number `count` is dropped below.
  number = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, count)
  rows = jnp.arange(B)[:, None]
  end = (
    jnp.full((B, count), -1)
    .at[rows, number]
    .set(jnp.broadcast_to(jnp.arange(L), (B, L)), mode='drop')
  )
  before = None
  if cfg.overlap:
    # The first series reads the window before, where there is one.
    before = end - m
    there = (before >= 0) & whole[rows, jnp.maximum(before, 0)]
    same = tokens.segments[rows, jnp.maximum(before, 0)]
    there &= same == tokens.segments[rows, jnp.maximum(end, 0)]
    before = jnp.where(there, before, -1)
  bias, norm = weights
  entry = norm(_entries(tokens.kv, tokens.gate, bias, end, before))
  # An entry is rotated to the place where its window starts.
  start = tokens.positions[rows, jnp.maximum(end - (m - 1), 0)]
  entry = tail_rope(entry, start, cfg.rope, cfg.rope_dim)
  return entry, jnp.where(end >= 0, start, -1)


def _entries(
  kv: jax.Array,
  gate: jax.Array,
  bias: jax.Array,
  end: jax.Array,
  before: jax.Array | None,
) -> jax.Array:
  """Returns the weighted sums of windows [B S C]; arguments of `compress`."""
  args, row = (kv, gate, bias, end, before), ('batch',)
  return kernels.pick(
    'compress',
    lambda impl, *args: compress(*args, impl=impl),
    lambda: reference.entries(*args),
    args,
    (row, row, (), row, row),
    row,
  )


def fresh_entries(
  cfg: CompressorConfig,
  weights: tuple[jax.Array, RMSNorm],
  tokens: Tokens,
  dtype: jax.typing.DTypeLike,
  along: Along = WHOLE,
) -> jax.Array:
  """Makes the entries of all documents [B S C], one after the other.

  Each device makes those whose windows end in its local tokens. They may draw
  on tokens of devices before; only finished entries go to all. See `view`.
  """
  T, m = tokens.positions.shape[1], cfg.ratio
  if not along.axis:
    return complete(cfg, weights, tokens, max(1, T // m))[0].astype(dtype)
  # Tokens of the devices before that a local entry may draw on.
  before = cfg.series * m - 1
  fills = Tokens(0, 0, -1, -1)
  joined = lambda a, fill: jnp.concatenate(
    [along.before(a, before, fill), a], axis=1
  )
  tokens = jax.tree.map(joined, tokens, fills)
  made, at = complete(cfg, weights, tokens, -(-T // m), T)
  made, there = along.gather((made.astype(dtype), at >= 0))
  return in_a_row(made, there, max(1, T * along.ways // m))


def _after(cfg: CompressorConfig, past: Compressed, new: Tokens) -> Tokens:
  """Returns the tokens that wait in a cache, and the new ones after them."""
  start = new.positions[:, 0]
  positions = ring.before(start, cfg.reach)
  waiting = Tokens(
    ring.unroll(past.kv, start, cfg.reach),
    ring.unroll(past.gate, start, cfg.reach),
    positions,
    (positions >= 0).astype(new.segments.dtype),
  )
  new = new._replace(segments=(new.segments > 0).astype(new.segments.dtype))
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), waiting, new)
