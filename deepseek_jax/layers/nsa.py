"""Native sparse attention (arXiv:2502.11089).

Three branches with keys and values of their own, each with its softmax, are
added under gates: compressed blocks of the whole past, the tokens of a few
selected blocks, a sliding window. A block's score is what the compressed branch
gives to it, summed over the heads of a group, which reads one choice of blocks.
Compressed blocks cover `block` tokens, one every `stride`, complete ones only;
all blocks are counted from the start of a document. Left open by the paper and
chosen here: rope turns queries and all keys before compression; gates are one
matrix; the compressing MLPs have one hidden layer and serve all groups.
Legend: B batch, T queries, S keys, D model, H heads, G groups, J = H / G,
K query/key dim, V value dim, E compressed entries, l block, F hidden,
N selected blocks, M gathered tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import cache as caching
from deepseek_jax.errors import InputError
from deepseek_jax.layers import query_blocks
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.indexer import best
from deepseek_jax.layers.rope import RopeConfig, rope, softmax_multiplier
from deepseek_jax.sharding import param, shard

_NEG = -1e30
CMP, SLC, WIN = range(3)  # the branches, in this order in all weights


@dataclasses.dataclass(frozen=True)
class NSAConfig:
  """Shapes, and what each branch reads.

  Attributes:
    heads, kv_heads: of queries and of keys; a group is the heads of one key.
    qk_dim, v_dim: K and V.
    block, stride: tokens of a compressed block, and between two of them.
    hidden: F, of the compressing MLPs.
    select_block, select: tokens of a selected block, and how many are read.
    initial, local: of these the first of a document and the last up to the
      query's own, which are always read.
    window: tokens of the sliding window, the query's own included.
    rope: of queries and keys.
    queries: at a time, at most.
  """

  heads: int
  kv_heads: int
  qk_dim: int
  v_dim: int
  block: int = 32
  stride: int = 16
  hidden: int = 192
  select_block: int = 64
  select: int = 16
  initial: int = 1
  local: int = 2
  window: int = 512
  rope: RopeConfig = RopeConfig(interleaved=False)
  queries: int = 64

  def __post_init__(self):
    positive = ('heads', 'kv_heads', 'qk_dim', 'v_dim', 'block', 'stride')
    positive += ('hidden', 'select_block', 'select', 'window', 'queries')
    for name in positive:
      if getattr(self, name) < 1:
        raise InputError(f'{name} = {getattr(self, name)}: must be at least 1')
    if self.heads % self.kv_heads:
      raise InputError(
        f'kv_heads = {self.kv_heads}: must divide heads = {self.heads}'
      )
    if self.qk_dim % 2:
      raise InputError(f'qk_dim = {self.qk_dim}: must be even for rope')
    for name in ('block', 'select_block'):
      if getattr(self, name) % self.stride:
        raise InputError(
          f'stride = {self.stride}: must divide {name} = {getattr(self, name)}'
        )
    if self.block > self.select_block:
      raise InputError(
        f'block = {self.block}: must be at most select_block ='
        f' {self.select_block}'
      )
    if not 0 <= self.initial + self.local <= self.select:
      raise InputError(
        f'select = {self.select}: must be at least initial + local ='
        f' {self.initial + self.local}'
      )

  @property
  def scale(self) -> float:
    return self.qk_dim**-0.5 * softmax_multiplier(self.rope)

  def cache(self, batch: int, slots: int, dtype) -> 'NSACache':
    """An empty cache: three keys and values a slot, and compressed ones."""
    G, K, V = self.kv_heads, self.qk_dim, self.v_dim
    entries = max(1, (slots - self.block) // self.stride + 1)
    empty = lambda *shape: jnp.zeros((batch, *shape), dtype)
    return NSACache(
      empty(slots, 3, G, K),
      empty(slots, 3, G, V),
      empty(entries, G, K),
      empty(entries, G, V),
    )

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'NSA':
    return NSA(self, dim, std=std, rngs=rngs)


class NSACache(NamedTuple):
  """Tokens by slot, compressed entries by their number."""

  k: jax.Array  # [B S 3 G K], turned
  v: jax.Array  # [B S 3 G V]
  ck: jax.Array  # [B E G K]
  cv: jax.Array  # [B E G V]


class Entries(NamedTuple):
  """Compressed blocks."""

  k: jax.Array  # [B E G K]
  v: jax.Array  # [B E G V]
  start: jax.Array  # [B E] int32, place of the first token; -1: no entry


class Queries(NamedTuple):
  """A block of queries and where they stand."""

  q: jax.Array  # [B T G J K]
  place: jax.Array  # [B T] int32, the query's own among the keys
  first: jax.Array  # [B T] int32, where its document begins
  gates: jax.Array  # [B T G J 3] float32


def document_starts(segments: jax.Array | None, shape) -> jax.Array:
  """Per token the place where its document begins, [B T] int32."""
  if segments is None:
    return jnp.zeros(shape, jnp.int32)
  index = jnp.arange(shape[1])
  first = jnp.ones((shape[0], 1), bool)
  new = jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=1)
  return jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def block_starts(first: jax.Array, cfg: NSAConfig) -> jax.Array:
  """Places where the complete compressed blocks of a batch begin.

  first: [B T] as `document_starts` gives it. Returns [B E], -1 for none.
  """
  T = first.shape[1]
  grown = jnp.arange(T) + 1 - first - cfg.block  # beyond the first block's end
  ends = (grown >= 0) & (grown % cfg.stride == 0)
  size = max(1, T // cfg.stride)
  pick = lambda row: jnp.nonzero(row, size=size, fill_value=-1)[0]
  ends = jax.vmap(pick)(ends)
  return jnp.where(ends < 0, -1, ends - cfg.block + 1)


def overlaps(cfg: NSAConfig) -> np.ndarray:
  """How many strides a selected block shares with the entries about it.

  For blocks of 64 and entries of 32 every 16: 1, 2, 2, 2, 1, from the entry
  that begins a stride before the block (equation 9, whose printed index holds
  when it counts from 1).
  """
  a, b = cfg.select_block // cfg.stride, cfg.block // cfg.stride
  m = np.arange(a + b - 1)
  return np.minimum(np.minimum(m + 1, a + b - 1 - m), min(a, b))


def masked_softmax(scores: jax.Array, seen: jax.Array) -> jax.Array:
  """Softmax over the last axis; all 0 where nothing is seen."""
  p = jax.nn.softmax(jnp.where(seen, scores, _NEG), axis=-1)
  return jnp.where(seen, p, 0)


def compressed_branch(one: Queries, entries: Entries, cfg: NSAConfig):
  """-> (output [B T G J V], attention [B T G J E] float32)."""
  seen = entries.start >= 0
  start, end = entries.start, entries.start + cfg.block - 1
  seen = seen[:, None] & (start[:, None] >= one.first[..., None])
  seen &= end[:, None] <= one.place[..., None]
  scores = jnp.einsum(
    'BTGJK,BEGK->BTGJE', one.q, entries.k, preferred_element_type=jnp.float32
  )
  p = masked_softmax(scores * cfg.scale, seen[:, :, None, None])
  return jnp.einsum(
    'BTGJE,BEGV->BTGJV', p.astype(entries.v.dtype), entries.v
  ), p


def select(one: Queries, p, entries: Entries, keys: int, cfg: NSAConfig):
  """The blocks that each group reads.

  Args:
    one: the queries; p: their attention to the entries [B T G J E].
    entries: what p is of.
    keys: tokens that there are; bounds the number of blocks.
    cfg: sizes.

  Returns:
    [B T G N] int32 numbers of blocks within the query's document; -1: none.
  """
  B, T, G = p.shape[:3]
  blocks = -(-keys // cfg.select_block)
  shares = jax.lax.stop_gradient(p).sum(axis=3)  # [B T G E]
  weights = overlaps(cfg)
  # The number of the first entry of the query's document. Entries of other
  # documents have no attention, so reading beyond its own adds nothing.
  before = (entries.start[:, None] < one.first[..., None]) & (
    entries.start[:, None] >= 0
  )
  strides = np.arange(blocks)[:, None] * (cfg.select_block // cfg.stride)
  near = strides - (cfg.block // cfg.stride - 1) + np.arange(len(weights))
  at = before.sum(axis=-1)[..., None, None] + near  # [B T blocks m]
  inside = (at >= 0) & (at < shares.shape[-1])
  at = jnp.where(inside, at, 0).reshape(B, T, 1, -1)
  found = jnp.take_along_axis(
    shares, jnp.broadcast_to(at, (B, T, G, at.shape[-1])), axis=-1
  ).reshape(B, T, G, blocks, -1)
  scores = jnp.where(inside[:, :, None], found * weights, 0).sum(axis=-1)
  own = (one.place - one.first)[..., None, None] // cfg.select_block
  number = jnp.arange(blocks)
  always = (number < cfg.initial) | (
    (number <= own) & (number > own - cfg.local)
  )
  scores = jnp.where(always, 1e30, scores)
  seen = jnp.broadcast_to(number <= own, scores.shape)
  flat = lambda a: a.reshape(B, T * G, blocks)
  chosen = best(flat(scores), flat(seen), min(cfg.select, blocks))
  return chosen.reshape(B, T, G, -1)


def gathered_attention(q, k, v, at, scale: float) -> jax.Array:
  """Attention of each query to rows of its own.

  Args:
    q: [B T G J K]; k: [B S G K]; v: [B S G V].
    at: [B T G M] int32 rows; -1 is none.
    scale: multiplies the scores.

  Returns:
    [B T G J V].
  """
  # A padded query may stand beyond the last slot.
  pick = lambda keys, rows: keys.at[rows].get(mode='clip')
  over_groups = jax.vmap(pick, (1, 1), 1)  # [S G .], [T G M] -> [T G M .]
  take = lambda keys: jax.vmap(over_groups)(keys, jnp.maximum(at, 0))
  scores = jnp.einsum(
    'BTGJK,BTGMK->BTGJM', q, take(k), preferred_element_type=jnp.float32
  )
  p = masked_softmax(scores * scale, (at >= 0)[:, :, :, None])
  return jnp.einsum('BTGJM,BTGMV->BTGJV', p.astype(v.dtype), take(v))


def selected_rows(one: Queries, chosen, cfg: NSAConfig) -> jax.Array:
  """Tokens of the chosen blocks up to the query, [B T G N * select_block]."""
  begin = one.first[..., None, None] + chosen * cfg.select_block
  rows = begin[..., None] + jnp.arange(cfg.select_block)
  seen = (chosen >= 0)[..., None] & (rows <= one.place[..., None, None, None])
  return jnp.where(seen, rows, -1).reshape(*chosen.shape[:3], -1)


def window_rows(one: Queries, groups: int, cfg: NSAConfig) -> jax.Array:
  """The last `window` tokens of the document, [B T G window]."""
  rows = one.place[..., None] - jnp.arange(cfg.window)
  rows = jnp.where(rows >= one.first[..., None], rows, -1)[:, :, None]
  return jnp.broadcast_to(rows, (*rows.shape[:2], groups, cfg.window))


def attend(
  queries: Queries, k: jax.Array, v: jax.Array, entries: Entries, cfg: NSAConfig
) -> jax.Array:
  """All branches, gated and added.

  Args:
    queries: T of them.
    k: [B S 3 G K]; v: [B S 3 G V], by branch; that of CMP is not read.
    entries: the compressed branch.
    cfg: sizes.

  Returns:
    [B T G J V].
  """
  S, G = k.shape[1], k.shape[3]

  def block(one: Queries):
    read = lambda branch, at: gathered_attention(
      one.q, k[:, :, branch], v[:, :, branch], at, cfg.scale
    )
    far, p = compressed_branch(one, entries, cfg)
    chosen = select(one, p, entries, S, cfg)
    near = read(SLC, selected_rows(one, chosen, cfg))
    last = read(WIN, window_rows(one, G, cfg))
    gates = one.gates.astype(far.dtype)
    return sum(y * gates[..., i, None] for i, y in enumerate((far, near, last)))

  gathered = cfg.select * cfg.select_block + cfg.window
  numbers = G * gathered * (cfg.qk_dim + cfg.v_dim)
  numbers += cfg.heads * entries.k.shape[1]
  return query_blocks.over_blocks(block, queries, cfg.queries, numbers)


class Compressor(nnx.Module):
  """A block's vectors, each with its place added -> one: an MLP."""

  def __init__(self, cfg: NSAConfig, width: int, *, std, rngs: nnx.Rngs):
    l, F = cfg.block, cfg.hidden
    init = nnx.initializers.normal(std)
    self.place = param(rngs, init, (l, width), (None, None))
    self.up = param(rngs, init, (l, width, F), (None, 'width', None))
    self.down = param(rngs, init, (F, width), (None, 'width'))

  def __call__(self, x: jax.Array) -> jax.Array:
    """[B E l G K] -> [B E G K]."""
    x = x + self.place[...][:, None]
    hidden = jax.nn.silu(jnp.einsum('BElGK,lKF->BEGF', x, self.up[...]))
    return jnp.einsum('BEGF,FK->BEGK', hidden, self.down[...])


class NSA(nnx.Module):
  """Compressed, selected and sliding attention under gates."""

  def __init__(self, cfg: NSAConfig, dim: int, *, std, rngs: nnx.Rngs):
    self.cfg = cfg
    D, H, G, K, V = dim, cfg.heads, cfg.kv_heads, cfg.qk_dim, cfg.v_dim
    init = nnx.initializers.normal(std)
    heads = ('embed', 'heads', None)
    branches = ('embed', 'branches', 'kv_heads', None)
    self.q = param(rngs, init, (D, H, K), heads)
    self.k = param(rngs, init, (D, 3, G, K), branches)
    self.v = param(rngs, init, (D, 3, G, V), branches)
    self.compress_k = Compressor(cfg, K, std=std, rngs=rngs)
    self.compress_v = Compressor(cfg, V, std=std, rngs=rngs)
    self.gate = param(rngs, init, (D, H, 3), heads)
    self.out = param(rngs, init, (H, V, D), ('heads', None, 'embed'))

  def entries(self, k, v, start: jax.Array) -> Entries:
    """Compresses the blocks of k, v [B S G .] that begin at start [B E]."""
    rows = jnp.maximum(start, 0)[..., None] + jnp.arange(self.cfg.block)
    rows = jnp.minimum(rows, k.shape[1] - 1)
    take = lambda a: query_blocks.rows(a, rows)
    return Entries(self.compress_k(take(k)), self.compress_v(take(v)), start)

  def remember(self, k, v, ctx: Context, past: NSACache) -> NSACache:
    """The cache with these tokens and the blocks that they complete."""
    cfg, write = self.cfg, caching.write
    k = write(past.k, k, ctx.positions, ctx.valid)
    v = write(past.v, v, ctx.positions, ctx.valid)
    T, begin = ctx.positions.shape[1], ctx.positions[:, :1]
    end = begin + (T if ctx.valid is None else ctx.valid.sum(1, keepdims=True))
    number = jnp.maximum((begin - cfg.block + cfg.stride) // cfg.stride, 0)
    number = number + jnp.arange(-(-T // cfg.stride))  # that may end in here
    start = number * cfg.stride
    made = self.entries(k[:, :, CMP], v[:, :, CMP], start)
    done = start + cfg.block <= end
    ck = write(past.ck, made.k, number, done)
    return NSACache(k, v, ck, write(past.cv, made.v, number, done))

  def __call__(
    self, x: jax.Array, ctx: Context, past: NSACache | None = None
  ) -> tuple[jax.Array, NSACache | None, dict]:
    """x [B T D] -> (y [B T D], cache with these tokens, no statistics)."""
    cfg, (B, T, _) = self.cfg, x.shape
    turn = lambda a: rope(a, ctx.positions, cfg.rope)
    q = turn(jnp.einsum('BTD,DHK->BTHK', x, self.q[...]))
    q = shard(q, 'batch', 'seq', 'heads', None)
    k = turn(jnp.einsum('BTD,DCGK->BTCGK', x, self.k[...]))
    v = jnp.einsum('BTD,DCGK->BTCGK', x, self.v[...])
    gates = jnp.einsum(
      'BTD,DHC->BTHC', x, self.gate[...], preferred_element_type=jnp.float32
    )
    if past is None:
      first = document_starts(ctx.segments, (B, T))
      place = jnp.broadcast_to(jnp.arange(T), (B, T))
      start = block_starts(first, cfg)
      entries = self.entries(k[:, :, CMP], v[:, :, CMP], start)
    else:
      past = self.remember(k, v, ctx, past)
      first, place = jnp.zeros((B, T), jnp.int32), ctx.positions
      k, v = past.k, past.v
      start = jnp.arange(past.ck.shape[1]) * cfg.stride
      start = jnp.broadcast_to(start, past.ck.shape[:2])
      entries = Entries(past.ck, past.cv, start)
    grouped = lambda a: a.reshape(B, T, cfg.kv_heads, -1, a.shape[-1])
    queries = Queries(grouped(q), place, first, grouped(jax.nn.sigmoid(gates)))
    y = attend(queries, k, v, entries, cfg).reshape(B, T, cfg.heads, -1)
    y = shard(y, 'batch', 'seq', 'heads', None)
    return jnp.einsum('BTHV,HVD->BTD', y, self.out[...]), past, {}
