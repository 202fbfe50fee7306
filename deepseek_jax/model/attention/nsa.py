"""Computes native sparse attention (arXiv:2502.11089).

Three branches with keys and values of their own, each with its softmax, are
added under gates: compressed blocks of the whole past, the tokens of a few
selected blocks, a sliding window. A block's score is what the compressed branch
gives to it, summed over the heads of a group, which reads one choice of blocks;
a branch is a softmax of its own, so each head counts alike, whatever its gates.
Compressed blocks cover `block` tokens, one every `stride`, complete ones only;
all blocks are counted from the start of a document. Left open by the paper and
chosen here: rope rotates queries and all keys before compression; gates are one
matrix; the compressing MLPs have one hidden layer and serve all groups.
Legend: B batch, T queries, S keys, D model, H heads, G groups, J = H / G,
K query/key dim, V value dim, E compressed entries, l block, F hidden,
N selected blocks, M gathered tokens.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import cache as caching
from deepseek_jax.model.attention import query_blocks
from deepseek_jax.model.attention.document_blocks import (
  block_starts,
  document_starts,
  new_tokens,
)
from deepseek_jax.model.attention.nsa_branches import (
  CMP,
  SLC,
  WIN,
  Entries,
  Keys,
  Queries,
  attend,
  keys_of,
)
from deepseek_jax.model.attention.rope import (
  RopeConfig,
  rope,
  softmax_multiplier,
)
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import products
from deepseek_jax.parallel import sequence as context
from deepseek_jax.parallel.sequence import Along, in_a_row
from deepseek_jax.parallel.sharding import param, shard


@dataclasses.dataclass(frozen=True)
class NSAConfig:
  """Describes the shapes, and what each branch reads.

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
    """Raises InputError for fields out of range or that do not fit together."""
    at_least(self, heads=1, kv_heads=1, qk_dim=1, v_dim=1, block=1, stride=1)
    at_least(self, hidden=1, select_block=1, select=1, window=1, queries=1)
    at_least(self, initial=0, local=0)
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
    if self.initial + self.local > self.select:
      raise InputError(
        f'select = {self.select}: must be at least initial + local ='
        f' {self.initial + self.local}'
      )

  @property
  def scale(self) -> float:
    """Returns what multiplies the scores."""
    return self.qk_dim**-0.5 * softmax_multiplier(self.rope)

  def cache(
    self,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> 'NSACache':
    """Returns an empty cache: three keys and values a slot, and entries.

    A slot is a position, which a rewound row overwrites: `spare` adds none.
    """
    del spare
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
    """Returns the attention of a model of width `dim`."""
    return NSA(self, dim, std=std, rngs=rngs)


class NSACache(NamedTuple):
  """Holds tokens by slot, and compressed entries by their number."""

  k: jax.Array  # [B S 3 G K], rotated
  v: jax.Array  # [B S 3 G V]
  ck: jax.Array  # [B E G K]
  cv: jax.Array  # [B E G V]


class BlockCompressor(nnx.Module):
  """Compresses a block's vectors, each with its place added, by an MLP."""

  def __init__(self, cfg: NSAConfig, width: int, *, std: float, rngs: nnx.Rngs):
    """Makes the places [l width], up [l width F] and down [F width]."""
    l, F = cfg.block, cfg.hidden
    init = nnx.initializers.normal(std)
    self.place = param(rngs, init, (l, width), (None, None))
    self.up = param(rngs, init, (l, width, F), (None, 'width', None))
    self.down = param(rngs, init, (F, width), (None, 'width'))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Compresses x [B E l G K] to [B E G K]."""
    x = x + self.place[...][:, None]
    hidden = jax.nn.silu(products.einsum('BElGK,lKF->BEGF', x, self.up[...]))
    return products.einsum('BEGF,FK->BEGK', hidden, self.down[...])


class NSA(nnx.Module):
  """Adds compressed, selected and sliding attention under gates."""

  def __init__(self, cfg: NSAConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes projections of three branches, the compressors, gates and out."""
    self.cfg = cfg
    D, H, G, K, V = dim, cfg.heads, cfg.kv_heads, cfg.qk_dim, cfg.v_dim
    init = nnx.initializers.normal(std)
    heads = ('embed', 'heads', None)
    branches = ('embed', 'branches', 'kv_heads', None)
    self.q = param(rngs, init, (D, H, K), heads)
    self.k = param(rngs, init, (D, 3, G, K), branches)
    self.v = param(rngs, init, (D, 3, G, V), branches)
    self.compress_k = BlockCompressor(cfg, K, std=std, rngs=rngs)
    self.compress_v = BlockCompressor(cfg, V, std=std, rngs=rngs)
    self.gate = param(rngs, init, (D, H, 3), heads)
    self.out = param(rngs, init, (H, V, D), ('heads', None, 'embed'))

  def remember(
    self, k: jax.Array, v: jax.Array, ctx: Context, past: NSACache
  ) -> NSACache:
    """Returns the cache with these tokens and the blocks that they complete."""
    cfg, write = self.cfg, caching.write
    k = write(past.k, k, ctx.positions, ctx.valid)
    v = write(past.v, v, ctx.positions, ctx.valid)
    T, (begin, end) = ctx.positions.shape[1], new_tokens(ctx)
    number = jnp.maximum((begin - cfg.block + cfg.stride) // cfg.stride, 0)
    number = number + jnp.arange(-(-T // cfg.stride))  # that may end in here
    start = number * cfg.stride
    # Some of these blocks may still lack tokens: they are not written.
    made = compressed(self.compress, keys_of(CMP, k, v), start, cfg)
    done = start + cfg.block <= end
    ck = write(past.ck, made.k, number, done)
    return NSACache(k, v, ck, write(past.cv, made.v, number, done))

  def __call__(
    self, x: jax.Array, ctx: Context, past: NSACache | None = None
  ) -> tuple[jax.Array, NSACache | None, dict]:
    """Returns y [B T D], the cache with the tokens of x [B T D], and {}."""
    cfg, (B, T, _) = self.cfg, x.shape
    turn = lambda a: rope(a, ctx.positions, cfg.rope)
    q = turn(products.einsum('BTD,DHK->BTHK', x, self.q[...]))
    q = shard(q, 'batch', 'seq', 'heads', None)
    k = turn(products.einsum('BTD,DCGK->BTCGK', x, self.k[...]))
    v = products.einsum('BTD,DCGK->BTCGK', x, self.v[...])
    gates = jnp.einsum(
      'BTD,DHC->BTHC', x, self.gate[...], preferred_element_type=jnp.float32
    )
    gates = jax.nn.sigmoid(gates)  # [B T H 3] float32
    if past is None:
      y = self.fresh(q, k, v, gates, ctx.segments)
    else:
      past = self.remember(k, v, ctx, past)
      # With a cache a row is one document, which begins at slot 0.
      first, start = jnp.zeros((B, T), jnp.int32), jnp.arange(past.ck.shape[1])
      start = jnp.broadcast_to(start * cfg.stride, past.ck.shape[:2])
      entries = Entries(past.ck, past.cv, start)
      queries = grouped(q, ctx.positions, first, gates, cfg.kv_heads)
      keys = (keys_of(branch, past.k, past.v) for branch in (SLC, WIN))
      y = attend(queries, *keys, entries, cfg).reshape(*q.shape[:3], -1)
    y = shard(y, 'batch', 'seq', 'heads', None)
    return products.einsum('BTHV,HVD->BTD', y, self.out[...]), past, {}

  @property
  def compress(self) -> tuple[BlockCompressor, BlockCompressor]:
    """Returns the compressors of keys and of values."""
    return self.compress_k, self.compress_v

  def fresh(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    segments: jax.Array | None,
  ) -> jax.Array:
    """Computes tokens that attend to each other only: [B T H V]."""
    rows, heads = ('batch', 'seq'), ('batch', 'seq', 'heads')
    keys = ('batch', 'seq', None, 'heads')
    B, T = q.shape[:2]
    return context.split(
      functools.partial(_fresh, self.cfg),
      (q, k, v, gates, segments, self.compress),
      (heads, keys, keys, heads, rows, ()),
      heads,
      batch=B,
      seq=T,
      heads=self.cfg.kv_heads,
    )


def compressed(
  compress: tuple[BlockCompressor, BlockCompressor],
  keys: Keys,
  start: jax.Array,
  cfg: NSAConfig,
) -> Entries:
  """Returns the compressed blocks of keys that begin at places start [B E]."""
  rows = jnp.maximum(start - keys.begin, 0)[..., None] + jnp.arange(cfg.block)
  # Incomplete blocks read any rows; their callers leave them out.
  rows = jnp.minimum(rows, keys.k.shape[1] - 1)
  k, v = (query_blocks.rows(a, rows) for a in keys[:2])
  return Entries(compress[0](k), compress[1](v), start)


def grouped(
  q: jax.Array,
  place: jax.Array,
  first: jax.Array,
  gates: jax.Array,
  groups: int,
) -> Queries:
  """Returns queries of q [B T H K] and gates [B T H 3], by groups of heads."""
  by_group = lambda a: a.reshape(*a.shape[:2], groups, -1, a.shape[-1])
  return Queries(by_group(q), place, first, by_group(gates))


def _with_before(along: Along, keys: Keys, count: int) -> Keys:
  """Returns the local tokens after the `count` before them."""
  if not along.axis:
    return keys
  join = lambda a: jnp.concatenate([along.before(a, count), a], axis=1)
  begin = along.index * keys.k.shape[1] - count
  return Keys(join(keys.k), join(keys.v), begin)


def _fresh(
  cfg: NSAConfig,
  along: Along,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  gates: jax.Array,
  segments: jax.Array | None,
  compress: tuple[BlockCompressor, BlockCompressor],
) -> jax.Array:
  """Computes the local queries of a batch without a cache: [B T H V].

  Only selected tokens and compressed blocks come from all devices.
  """
  (B, T), groups = q.shape[:2], k.shape[3]
  begin, every = along.index * T, T * along.ways
  first = document_starts(along.gather(segments), (B, every))
  first = along.own(first)
  size = -(-T // cfg.stride) if along.axis else None
  start = block_starts(first, cfg.block, cfg.stride, begin, size)
  # A block that ends here may begin on the device before.
  near = _with_before(along, keys_of(CMP, k, v), cfg.block - 1)
  entries = along.gather(compressed(compress, near, start, cfg))
  if along.axis:
    # Each device filled its share up: real entries move together.
    there = entries.start >= 0
    keep = lambda a: in_a_row(a, there, max(1, every // cfg.stride))
    entries = jax.tree.map(keep, entries)
  place = jnp.broadcast_to(begin + jnp.arange(T), (B, T))
  # Any token may be selected, so these keys are gathered from all.
  selected = Keys(*along.gather(tuple(keys_of(SLC, k, v)[:2])))
  # A window reaches W - 1 tokens back, into few devices.
  window = _with_before(along, keys_of(WIN, k, v), cfg.window - 1)
  queries = grouped(q, place, first, gates, groups)
  y = attend(queries, selected, window, entries, cfg)
  return y.reshape(*q.shape[:3], -1)
