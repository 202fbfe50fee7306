"""Builds the transformer: the only place that knows the order of layers.

A model is data (see transformer_config); `build` turns it into pure functions
over plain dicts.
Legend: B batch, T tokens, D model, V vocabulary, L layers, n streams.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import key
from deepseek_jax.errors import InputError
from deepseek_jax.model import given as inputs
from deepseek_jax.model import kernels, lookup, lora
from deepseek_jax.model.block import Block
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import Context, context
from deepseek_jax.model.functional import functional
from deepseek_jax.model.memory.ngram_hash import NGramHash
from deepseek_jax.model.mtp import shifted
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.stacks import empty_cache
from deepseek_jax.model.transformer_config import Segment, TransformerConfig
from deepseek_jax.parallel.sharding import Buffer, param, shard


class Output(NamedTuple):
  """Holds what a call of the model returns.

  Attributes:
    logits: [B T V] float32.
    hidden: [B T D], the state that the head reads (after the final norm).
    cache: the cache with these tokens, or None.
    aux: {'segments': per segment, per block of its pattern, statistics
      stacked over repeats; 'mtp': per depth, its statistics; 'mtp_hidden':
      per depth, [B T D]}.
  """

  logits: jax.Array
  hidden: jax.Array
  cache: Cache | None
  aux: dict[str, Any]


class Transformer(nnx.Module):
  """Computes logits from tokens: embedding, segments of blocks, norm, head."""

  def __init__(
    self,
    cfg: TransformerConfig,
    *,
    rngs: nnx.Rngs,
    repeats: tuple[slice, ...] | None = None,
  ):
    """Makes all layers, or some.

    Args:
      cfg: the model's configuration.
      rngs: of `params`.
      repeats: of each segment, those to make, with the weights that they have
        in the whole model; by default all.
    """
    self.cfg = cfg
    D, V, std = cfg.dim, cfg.vocab_size, cfg.init_std
    init = nnx.initializers.normal(std)
    self.embed = param(rngs, init, (V, D), ('vocab', 'embed'))
    segments = cfg.segments()
    repeats = repeats or (slice(None),) * len(segments)
    self.segments = nnx.List(
      [self._stack(*which, rngs) for which in zip(segments, repeats)]
    )
    self._number_engrams()
    if cfg.engram_layers():
      self.ngrams = NGramHash(cfg.engram, V, cfg.engram_layers())
    self.residual = cfg.residual.head(D, std=std, rngs=rngs)
    self.norm = RMSNorm(D, eps=cfg.norm_eps, rngs=rngs)
    if not cfg.tied:
      self.head = param(rngs, init, (D, V), ('embed', 'vocab'))
    if cfg.mtp.depth:
      block = cfg.block(cfg.mtp.block)
      self.mtp = nnx.List(
        [
          cfg.mtp.build(block, D, std=std, rngs=rngs)
          for _ in range(cfg.mtp.depth)
        ]
      )

  def _stack(
    self, segment: Segment, repeats: slice, rngs: nnx.Rngs
  ) -> nnx.List:
    """Makes repeats of a segment; every weight is stacked [repeat ...]."""
    D, std = self.cfg.dim, self.cfg.init_std

    def pattern(key: jax.Array) -> nnx.List:
      rngs = nnx.Rngs(key)
      return nnx.List([Block(b, D, std=std, rngs=rngs) for b in segment.blocks])

    # A key for each repeat of the whole model, so that a part of them gets the
    # same weights.
    keys = jax.random.split(rngs.params(), segment.repeat)
    return jax.vmap(pattern)(keys[repeats])

  def _number_engrams(self):
    """Numbers the layers with an Engram, so that each reads its own rows."""
    number = 0
    for segment, blocks in zip(self.cfg.segments(), self.segments):
      own = [i for i, b in enumerate(segment.blocks) if b.engram]
      for place, i in enumerate(own):
        # Repeats of a pattern come one after the other: [repeat].
        each = number + place + len(own) * jnp.arange(segment.repeat)
        blocks[i].engram.number = Buffer(each.astype(jnp.int32), axes=())
      number += len(own) * segment.repeat

  def hashed(
    self, ctx: Context, cache: Cache | None
  ) -> tuple[Context, jax.Array | None]:
    """Returns ctx with the rows of its n-grams, and the ring of last tokens.

    Rows that ctx has already are kept; without Engrams the ring is None.
    """
    if not self.cfg.engram_layers():
      return ctx, None
    rows, recent = self.ngrams(ctx, cache and cache.recent)
    return (ctx if ctx.rows is not None else ctx._replace(rows=rows)), recent

  def head_weight(self) -> jax.Array:
    """Returns [D V], the weight that makes logits of `hidden`."""
    return self.embed[...].T if self.cfg.tied else self.head[...]

  def _remat(self, body: Callable) -> Callable:
    """Wraps a layer so that the backward pass recomputes what `remat` says."""
    policies = {
      'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
      'full': None,
    }
    if self.cfg.compute.remat == 'none':
      return body
    return jax.checkpoint(body, policy=policies[self.cfg.compute.remat])

  def _segment(
    self, blocks: nnx.List, stream: jax.Array, ctx: Context, caches: tuple
  ) -> tuple[jax.Array, Any, Any]:
    """Runs one segment's repeats.

    Args:
      blocks: the segment's pattern, weights stacked [repeat ...].
      stream: [B T D] or [B T n D].
      ctx: the tokens.
      caches: per block of the pattern, stacked [repeat ...], or None.

    Returns:
      The stream, and the caches and statistics stacked as `caches` is.
    """

    def body(stream: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
      out = []
      for block, past in zip(*layer):
        stream, past, stats = block(stream, ctx, past)
        out.append((past, stats))
      return stream, tuple(zip(*out))

    body = self._remat(body)
    repeat = jax.tree.leaves(blocks)[0].shape[0]
    if self.cfg.compute.scan and repeat > 1:
      stream, (caches, stats) = jax.lax.scan(body, stream, (blocks, caches))
      return stream, caches, stats
    # Unrolled: one layer is taken out of the stack at a time.
    each = []
    for i in range(repeat):
      layer = jax.tree.map(lambda a, i=i: a[i], (blocks, caches))
      stream, out = body(stream, layer)
      each.append(out)
    caches, stats = jax.tree.map(lambda *a: jnp.stack(a), *each)
    return stream, caches, stats

  def embedded(self, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings [B T D] of tokens [B T]."""
    # Whole rows: a lookup in sharded ones leaves D sharded, as no layer is.
    return lookup.rows(shard(self.embed[...], 'vocab', None), tokens)

  def enter(self, ctx: Context) -> jax.Array:
    """Returns the stream before the first block, [B T D] or [B T n D]."""
    stream = self.cfg.residual.expand(self.embedded(ctx.tokens))
    return shard(stream, 'batch', 'seq', *(None,) * (stream.ndim - 2))

  def through(
    self, stream: jax.Array, ctx: Context, cache: Cache | None
  ) -> tuple[jax.Array, list, list]:
    """Runs all blocks.

    Returns:
      The stream, and lists of caches and of statistics, one per segment.
    """
    caches, statistics = [], []
    for i, blocks in enumerate(self.segments):
      past = cache.layers[i] if cache else (None,) * len(blocks)
      stream, past, stats = self._segment(blocks, stream, ctx, past)
      caches.append(past)
      statistics.append(stats)
    return stream, caches, statistics

  def leave(
    self, stream: jax.Array, ctx: Context, mtp: bool
  ) -> tuple[jax.Array, dict]:
    """Collapses the stream after the last block.

    Args:
      stream: [B T D] or [B T n D].
      ctx: the tokens.
      mtp: whether to run multi-token prediction.

    Returns:
      hidden [B T D], and {'mtp', 'mtp_hidden'} of `Output.aux` or {}.
    """
    hidden, aux = self.norm(self.residual.collapse(stream)), {}
    if mtp and self.cfg.mtp.depth:
      # V4 goes on from the streams, V3 from the normed state.
      state = stream if self.cfg.mtp.streams else hidden
      aux['mtp'], aux['mtp_hidden'] = self._mtp(state, ctx)
    return hidden, aux

  def __call__(self, ctx: Context, cache: Cache | None, mtp: bool) -> Output:
    """Returns logits, hidden states, cache and statistics of a batch.

    Args:
      ctx: the tokens.
      cache: what is cached of earlier tokens, or None.
      mtp: whether to run multi-token prediction.
    """
    # Rows of Engram tables [B T L K], unless the data pipeline hashed them.
    ctx, recent = self.hashed(ctx, cache)
    # Embedding and all blocks: [B T D] or, with hyper-connections, [B T n D].
    stream, caches, statistics = self.through(self.enter(ctx), ctx, cache)
    # Collapse and final norm: [B T D]; then the blocks that predict further.
    hidden, aux = self.leave(stream, ctx, mtp)
    aux = {'segments': statistics, **aux}
    # Logits [B T V], float32: a loss subtracts them from their log-sum-exp.
    logits = jnp.einsum(
      'BTD,DV->BTV',
      hidden,
      self.head_weight(),
      preferred_element_type=jnp.float32,
    )
    if cache:
      # Padding takes no slot.
      new = ctx.tokens.shape[1] if ctx.valid is None else ctx.valid.sum(axis=1)
      cache = Cache(
        tuple(caches), cache.length + new, cache.slots, False, recent
      )
    return Output(logits, hidden, cache, aux)

  def _mtp(
    self, state: jax.Array, ctx: Context
  ) -> tuple[list[dict], list[jax.Array]]:
    """Runs the depths of MTP: (statistics, states for the head [B T D])."""
    statistics, states = [], []
    for depth, module in enumerate(self.mtp, start=1):
      # Depth k embeds the token k places on, at the place that predicts.
      at = shifted(ctx, depth)
      state, stats = module(state, self.embedded(at.tokens), at)
      statistics.append(stats)
      states.append(module.readout(state))
    return statistics, states


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """Holds a transformer as pure functions over plain nested dicts.

  Two that `build` made of equal configurations are equal, and so share what
  was compiled for one of them.

  Attributes:
    config: the model's configuration.
    init: key -> {'params': {...}, 'buffers': {...}}, float32.
    apply: see `build`.
    init_cache: (batch, slots) -> empty Cache in the compute dtype.
    head: variables -> [D V], what turns `hidden` into logits.
    cast: variables -> the same in the compute dtype, except the parameters
      that stay float32, and without adapters, which are folded into their
      weights; apply does it too, so do it once before a loop.
    abstract: key-free nnx.State of shapes, dtypes and axis names.
  """

  config: TransformerConfig
  init: Callable[[jax.Array], dict]
  apply: Callable[..., Output]
  init_cache: Callable[[int, int], Cache]
  head: Callable[[dict], jax.Array]
  cast: Callable[[dict], dict]
  abstract: dict[str, nnx.State]

  @functools.cached_property
  def _key(self) -> tuple:
    """Returns what equal models share: configuration and functions."""
    # What `build` made is as the configuration says; a function that a user
    # put in its place is itself.
    one = lambda f: f.__qualname__ if _built(f) else f
    functions = self.init, self.apply, self.init_cache, self.head, self.cast
    return key(self.config), *map(one, functions)

  def __eq__(self, other: object) -> bool:
    """Returns whether both have equal configurations and functions."""
    return isinstance(other, Model) and self._key == other._key

  def __hash__(self) -> int:
    """Returns a hash that equal models share."""
    return hash(self._key)


def _built(function: Callable) -> bool:
  """Returns whether a function of a Model comes from `build`."""
  name = getattr(function, '__qualname__', '')
  module = getattr(function, '__module__', '')
  return any(
    module == f.__module__ and name.startswith(f'{f.__name__}.<locals>')
    for f in (build, functional, lora.adapted)
  )


def build(config: TransformerConfig) -> Model:
  """Makes the pure functions of a model; allocates no array.

  apply(variables, tokens, *, positions=None, segment_ids=None, cache=None,
  train=False, mtp=False, ngrams=None) -> Output, with
    tokens: [B T] int32, each 0..V - 1 except on padding, where it may be
      anything. Another number is an InputError; inside jit, where it can't be
      known, it gives NaN logits in its row and changes no other.
    positions: [B T] int32; by default those after the cached tokens, or from 0
      within each document.
    segment_ids: [B T] int32. A run of equal ids is a document, which attends
      to no other: the same id further on is another document. 0 (or less) is
      padding, which is cached, routed and counted nowhere. None: all of a row
      is one document.
    cache: from `init_cache` or an earlier Output. With one, a row is one
      document: segment_ids tell its tokens, 1, from the padding around them, 0;
      after the first call padding comes last. More documents in a row are an
      InputError, and NaN logits in that row inside jit: decode a packed row as
      rows of their own.
    train: applies what is for training only (capacity).
    mtp: runs the multi-token prediction blocks too.
    ngrams: [B T L K] int32, rows of the Engrams' tables that the data
      pipeline has hashed; by default they are hashed here, to the same. What
      is no row is treated as what is no token.

  Raises:
    InputError: `config` is no TransformerConfig.
  """
  if not isinstance(config, TransformerConfig):
    raise InputError(
      f'config: {config!r} is no TransformerConfig; presets are functions that'
      ' make one, as ds.presets.v3_tiny()'
    )
  make = lambda key: Transformer(config, rngs=nnx.Rngs(key))
  dtype = jnp.dtype(config.compute.dtype)
  abstract, init, _, merge, cast = functional(make, dtype, config.lora)
  if config.lora is not None:
    lora.check(abstract['params'], config.lora)

  def apply(
    variables: dict,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    train: bool = False,
    mtp: bool = False,
    ngrams: jax.Array | None = None,
  ) -> Output:
    given = inputs.Given(tokens, positions, segment_ids, ngrams)
    inputs.check(config, given, cache)
    fresh = cache is None or cache.fresh
    if positions is None and not fresh:
      # Later calls go on after the cached tokens of each row.
      positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
    ctx = context(
      tokens,
      segment_ids,
      config.vocab_size,
      positions=positions,
      rows=ngrams,
      cached=cache is not None,
      train=train,
      fresh=fresh,
    )
    with kernels.using(config.compute.kernels):
      return merge(cast(variables))(ctx, cache, mtp)

  def init_cache(batch: int, slots: int) -> Cache:
    return empty_cache(config, dtype, batch, slots)

  head = lambda variables: merge(cast(variables)).head_weight()
  return Model(config, init, apply, init_cache, head, cast, abstract)
