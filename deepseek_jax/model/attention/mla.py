"""Computes multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

Section 2.1: keys and values of all heads are up-projections of one latent `c`;
only `c` (after its norm) and one shared rotary key (after rope) are cached.
Legend: B batch, T queries, S cache slots, D model, H heads, Q query latent,
C key-value latent, N no-rope dim, R rope dim, V value dim.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import cache as caching
from deepseek_jax.model import kernels
from deepseek_jax.model.attention import absorbing
from deepseek_jax.model.attention.latent_reading import (
  GROUP,
  FP8Latent,
  Latent,
  decoded,
  encoded,
  latent_attention,
)
from deepseek_jax.model.attention.paged_latent import (
  PagedLatent,
  last_first,
)
from deepseek_jax.model.attention.rope import (
  RopeConfig,
  frequencies,
  rope,
  softmax_multiplier,
  table_multiplier,
)
from deepseek_jax.model.attention.softmax import (
  cached_attention,
)
from deepseek_jax.model.context import Context
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.parallel import products
from deepseek_jax.parallel.gathered_attention import expand_latents
from deepseek_jax.parallel.sharding import param, shard
from pallas_kernels.latent_kv import FP8Pages, Pages, latent_kv
from pallas_kernels.mla_decode import mla_decode

FP8 = jnp.float8_e4m3fn
Past = Latent | FP8Latent | PagedLatent


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Describes latent attention.

  Attributes:
    heads: H.
    q_rank: Q; None leaves queries uncompressed.
    kv_rank: C.
    nope_dim: N.
    rope_dim: R, even.
    v_dim: V.
    rope: of the R channels.
    norm_eps: of the latents' norms.
  """

  heads: int
  q_rank: int | None
  kv_rank: int
  nope_dim: int
  rope_dim: int
  v_dim: int
  rope: RopeConfig = RopeConfig()
  norm_eps: float = 1e-6

  def __post_init__(self):
    """Raises InputError for a field out of its range, or an odd rope_dim."""
    at_least(self, heads=1, q_rank=1, kv_rank=1)
    at_least(self, nope_dim=1, rope_dim=1, v_dim=1)
    above(self, norm_eps=0)
    if self.rope_dim % 2:
      raise InputError(f'rope_dim = {self.rope_dim}: must be even')

  @property
  def scale(self) -> float:
    """Returns the softmax scale over N + R dims, with YaRN's mscale squared."""
    return (self.nope_dim + self.rope_dim) ** -0.5 * softmax_multiplier(
      self.rope
    )

  def cache(
    self,
    batch: int,
    slots: int,
    dtype: jax.typing.DTypeLike,
    spare: int = 0,
  ) -> 'Latent | FP8Latent':
    """Returns an empty cache: C + R numbers per slot, in float8 their scales.

    A slot is a position, which a rewound row overwrites: `spare` adds none.
    """
    del spare
    empty = lambda width, dtype: jnp.zeros((batch, slots, width), dtype)
    if dtype != FP8:
      return Latent(empty(self.kv_rank, dtype), empty(self.rope_dim, dtype))
    return FP8Latent(
      empty(self.kv_rank, FP8),
      empty(self.rope_dim, jnp.bfloat16),
      empty(self.kv_rank // GROUP, jnp.float32),
    )

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'MLA':
    """Returns the attention of a model of width `dim`."""
    return MLA(self, dim, std=std, rngs=rngs)


class MLA(nnx.Module):
  """Computes latent attention, in expanded and absorbed form."""

  def __init__(self, cfg: MLAConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes down- and up-projections, their norms, and out [H V D]."""
    self.cfg = cfg
    D, H, Q, C = dim, cfg.heads, cfg.q_rank, cfg.kv_rank
    N, R, V = cfg.nope_dim, cfg.rope_dim, cfg.v_dim
    init = nnx.initializers.normal(std)
    if Q is not None:
      self.q_down = param(rngs, init, (D, Q), ('embed', 'q_latent'))
      self.q_norm = RMSNorm(Q, eps=cfg.norm_eps, rngs=rngs)
    self.q_up = param(
      rngs,
      init,
      (Q or D, H, N + R),
      ('q_latent' if Q else 'embed', 'heads', None),
    )
    self.kv_down = param(rngs, init, (D, C + R), ('embed', None))
    self.kv_norm = RMSNorm(C, eps=cfg.norm_eps, rngs=rngs)
    # Keys and values in one: the first N columns of a head are its keys'.
    self.kv_up = param(rngs, init, (C, H, N + V), ('kv_latent', 'heads', None))
    self.out = param(rngs, init, (H, V, D), ('heads', None, 'embed'))

  def query_latent(self, x: jax.Array) -> jax.Array:
    """Returns the normed query latent [B T Q], or x when uncompressed."""
    return (
      x
      if self.cfg.q_rank is None
      else self.q_norm(products.matmul(x, self.q_down[...]))
    )

  def query(
    self, x: jax.Array, positions: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns no-rope [B T H N] and rotated part [B T H R] of x [B T D]."""
    q = products.einsum('BTQ,QHK->BTHK', self.query_latent(x), self.q_up[...])
    q = shard(q, 'batch', 'seq', 'heads', None)
    qn, qr = jnp.split(q, [self.cfg.nope_dim], axis=-1)
    return qn, rope(qr, positions, self.cfg.rope)

  def latent(self, x: jax.Array, positions: jax.Array) -> Latent:
    """Returns what is cached of x [B T D]: normed latent, rotated rope key."""
    c, kr = jnp.split(
      products.matmul(x, self.kv_down[...]), [self.cfg.kv_rank], axis=-1
    )
    # The norm covers the latent alone, not the rope key.
    return Latent(self.kv_norm(c), rope(kr, positions, self.cfg.rope))

  def write(
    self,
    x: jax.Array,
    ctx: Context,
    latent: Latent | None,
    past: Past,
  ) -> Past:
    """Returns the cache with x [B T D] written.

    Args:
      x: [B T D].
      ctx: its tokens.
      latent: of x, or None if not needed otherwise.
      past: the cache.
    """

    held = past.pages if isinstance(past, PagedLatent) else past

    def own() -> Past:
      new = self.latent(x, ctx.positions) if latent is None else latent
      if isinstance(held, FP8Latent):
        new = encoded(new)
      if isinstance(past, PagedLatent):
        return past.written(new, ctx.positions, ctx.valid)
      put = lambda b, n: caching.write(b, n, ctx.positions, ctx.valid)
      return type(new)(*map(put, past, new))

    if latent is not None:
      return own()
    arrays = x, ctx.positions, ctx.valid, past
    weights = self.kv_down[...], self.kv_norm.scale[...]
    row = ('batch',)
    return kernels.pick(
      'latent_kv',
      self.stored,
      own,
      (*arrays, *weights),
      (row, row, row, row, (), ()),
      type(past)(*(row for _ in past)),
    )

  def stored(
    self,
    impl: str,
    x: jax.Array,
    positions: jax.Array,
    valid: jax.Array | None,
    past: Past,
    down: jax.Array,
    gain: jax.Array,
  ) -> Past:
    """Computes `write` by the kernel that projects and stores in one."""
    at, paged = positions, isinstance(past, PagedLatent)
    held = past.pages if paged else past
    # The cache as one list of slots, row after row; -1 is not written.
    if paged:
      slots = past.slots(at, valid)
    else:
      S = past.c.shape[1]
      inside = at < S if valid is None else (at < S) & valid
      row = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None] * S
      slots = jnp.where(inside, row + at, -1)
    angles = at[..., None] * jnp.asarray(
      frequencies(self.cfg.rope, self.cfg.rope_dim), jnp.float32
    )
    flat = lambda a: a.reshape(-1, a.shape[-1])
    # YaRN may scale cos and sin, too.
    turn = table_multiplier(self.cfg.rope)
    cos, sin = (turn * f(flat(angles)) for f in (jnp.cos, jnp.sin))
    if isinstance(held, FP8Latent):
      cache = FP8Pages(held.c, held.scales, held.kr)
    else:
      cache = Pages(*held)
    cache = latent_kv(
      flat(x),
      down,
      gain,
      cos,
      sin,
      slots.reshape(-1),
      cache,
      eps=self.cfg.norm_eps,
      interleaved=self.cfg.rope.interleaved,
      impl=impl,
    )
    held = held._replace(
      c=cache.c,
      kr=cache.k_r,
      **({'scales': cache.scales} if isinstance(cache, FP8Pages) else {}),
    )
    return past._replace(pages=held) if paged else held

  def ups(self) -> tuple[jax.Array, jax.Array]:
    """Returns the up-projections of keys [C H N] and of values [C H V]."""
    k_up, v_up = jnp.split(self.kv_up[...], [self.cfg.nope_dim], axis=-1)
    return k_up, v_up

  def absorbed(
    self, qn: jax.Array, qr: jax.Array, latent: Latent, positions: jax.Array
  ) -> jax.Array:
    """Attends to the latents themselves (V2 section 2.1.2): [B T H V].

    Args:
      qn, qr: [B T H N] and [B T H R].
      latent: the cache with these tokens.
      positions: [B T].
    """
    k_up, v_up = self.ups()
    qc = absorbing.into_queries(qn, k_up)
    f32 = {'preferred_element_type': jnp.float32}
    scores = jnp.einsum('BTHC,BSC->BHTS', qc, latent.c, **f32)
    scores += jnp.einsum('BTHR,BSR->BHTS', qr, latent.kr, **f32)
    visible = positions[..., None] >= jnp.arange(latent.c.shape[1])  # [B T S]
    scores = jnp.where(visible[:, None], scores * self.cfg.scale, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(latent.c.dtype)
    # Heads before tokens: the other way round XLA:CPU transposes the cache.
    mixed = products.einsum('BHTS,BSC->BHTC', weights, latent.c)
    return absorbing.into_values(mixed.swapaxes(1, 2), v_up)

  def decoded(
    self,
    impl: str,
    qn: jax.Array,
    qr: jax.Array,
    held: Latent | FP8Latent,
    positions: jax.Array,
    k_up: jax.Array,
    v_up: jax.Array,
  ) -> jax.Array:
    """Computes `absorbed` by the kernel of decoding."""
    qc = absorbing.into_queries(qn, k_up)
    # The kernel takes the queries of a request for its last tokens; these may
    # be any, so each is a request of its own over the row's one page.
    B, T = positions.shape
    alone = lambda a: a.reshape(B * T, 1, *a.shape[2:])
    table = jnp.repeat(jnp.arange(B, dtype=jnp.int32), T)[:, None]
    mixed = mla_decode(
      alone(qc),
      alone(qr),
      *held[:2],
      table,
      positions.reshape(-1).astype(jnp.int32) + 1,
      scale=self.cfg.scale,
      scales=getattr(held, 'scales', None),
      impl=impl,
    )
    return absorbing.into_values(mixed.reshape(qc.shape), v_up)

  def read_pages(
    self,
    qn: jax.Array,
    qr: jax.Array,
    past: PagedLatent,
    ctx: Context,
  ) -> jax.Array:
    """Attends to the tokens of a request's pages: [B T H V].

    Args:
      qn, qr: [B T H N] and [B T H R], of tokens that follow one another.
      past: the cache with these tokens.
      ctx: of these tokens.
    """
    # Drafts past a request's pages have no place; they are not read, either.
    count = (past.slots(ctx.positions, ctx.valid) >= 0).sum(axis=1)
    length = jnp.where(count > 0, ctx.positions[:, 0] + count, 0)
    row, heads = ('batch',), ('batch', None, 'heads')
    return kernels.pick(
      'mla_decode',
      self.decoded_pages,
      lambda: self.absorbed(
        qn, qr, decoded(past.gathered(length), qn.dtype), ctx.positions
      ),
      (qn, qr, past.pages, past.table, length, count, *self.ups()),
      (heads, heads, (), row, row, row, (None, 'heads'), (None, 'heads')),
      heads,
      devices=('gpu', 'tpu'),
    )

  def decoded_pages(
    self,
    impl: str,
    qn: jax.Array,
    qr: jax.Array,
    pages: Latent | FP8Latent,
    table: jax.Array,
    length: jax.Array,
    count: jax.Array,
    k_up: jax.Array,
    v_up: jax.Array,
  ) -> jax.Array:
    """Computes `read_pages` by the kernel, all tokens of a row at once."""
    qc = absorbing.into_queries(qn, k_up)
    # Its queries are the row's last tokens; behind those that count may be
    # others, which go before them.
    mixed = mla_decode(
      last_first(qc, count),
      last_first(qr, count),
      *pages[:2],
      table,
      length.astype(jnp.int32),
      scale=self.cfg.scale,
      scales=getattr(pages, 'scales', None),
      impl=impl,
    )
    mixed = last_first(mixed, -count)
    return absorbing.into_values(mixed, v_up)

  def absorbing_pays(self, queries: int) -> bool:
    """Returns whether the absorbed form costs less than expanding cached keys.

    Per key and head: `queries` wider products against one up-projection.
    """
    cfg = self.cfg
    wider = 2 * cfg.kv_rank - cfg.nope_dim - cfg.v_dim
    return queries * wider < cfg.kv_rank * (cfg.nope_dim + cfg.v_dim)

  def attend(
    self,
    qn: jax.Array,
    qr: jax.Array,
    latent: Latent | None,
    past: Past | None,
    ctx: Context,
  ) -> jax.Array:
    """Attends densely to `latent`, these tokens, or to the cache `past`.

    Args:
      qn, qr: as `query` returns them.
      latent: of the same tokens.
      past: the cache with these tokens written, or None.
      ctx: of these tokens.

    Returns:
      [B T H V].
    """
    if past is None or ctx.fresh:
      # A first call attends to its own tokens: keys are expanded.
      q = jnp.concatenate([qn, qr], axis=-1)
      how = {'scale': self.cfg.scale, 'segments': ctx.segments}
      return latent_attention(q, latent, self.kv_up[...], **how)
    if isinstance(past, PagedLatent):
      return self.read_pages(qn, qr, past, ctx)
    # Few new tokens: the cache is read as it is stored.
    if self.absorbing_pays(qn.shape[1]):
      row, heads = ('batch',), ('batch', None, 'heads')
      return kernels.pick(
        'mla_decode',
        self.decoded,
        lambda: self.absorbed(qn, qr, decoded(past, qn.dtype), ctx.positions),
        (qn, qr, past, ctx.positions, *self.ups()),
        (heads, heads, row, row, (None, 'heads'), (None, 'heads')),
        heads,
        devices=('gpu', 'tpu'),
      )
    # Many new tokens: expanding the cached keys costs less.
    q = jnp.concatenate([qn, qr], axis=-1)
    latent = decoded(past, q.dtype)
    k, v = expand_latents(q.shape[2:], latent, self.kv_up[...])
    return cached_attention(q, k, v, ctx.positions, scale=self.cfg.scale)

  def project(self, y: jax.Array) -> jax.Array:
    """Projects the heads' values [B T H V] to [B T D]."""
    y = shard(y, 'batch', 'seq', 'heads', None)
    return products.einsum('BTHV,HVD->BTD', y, self.out[...])

  def __call__(
    self,
    x: jax.Array,
    ctx: Context,
    past: Past | None = None,
  ) -> tuple[jax.Array, Past | None, dict]:
    """Returns y [B T D], the cache with the tokens of x [B T D], and {}."""
    qn, qr = self.query(x, ctx.positions)  # [B T H N], [B T H R]
    # Later calls attend to the cache alone: a kernel may store right into it.
    latent = None
    if past is None or ctx.fresh:
      latent = self.latent(x, ctx.positions)
    if past is not None:
      past = self.write(x, ctx, latent, past)
    return self.project(self.attend(qn, qr, latent, past, ctx)), past, {}
