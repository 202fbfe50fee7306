"""Runs the layers of a transformer: the only place that knows their order.

Legend: B batch, T tokens, D model, V vocabulary, L layers, n streams.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.model import lookup
from deepseek_jax.model.block import Block
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import Context
from deepseek_jax.model.drafting import Draft
from deepseek_jax.model.memory.ngram_hash import NGramHash
from deepseek_jax.model.mtp import Ahead, shifted
from deepseek_jax.model.norm import RMSNorm
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
      per depth, [B T D]; 'mtp_state': what drafting takes of each token,
      [B T D] or, with streams, [B T n D]}.
  """

  logits: jax.Array
  hidden: jax.Array
  cache: Cache | None
  aux: dict[str, Any]


def _some_alike(blocks: nnx.List, repeat: int) -> bool:
  """Returns whether blocks of a pattern that is traced `repeat` times are."""
  kinds = [jax.tree.structure(block) for block in blocks]
  try:
    return repeat > 1 or any(kinds.count(kind) > 1 for kind in kinds)
  except ValueError:  # of an array among the settings of a module of one's own
    return False


def _runner(
  ctx: Context, blocks: nnx.List, repeat: int, traced: bool
) -> Callable:
  """Returns what runs one of the blocks: (block, stream, past, route) -> ...

  Of those that are alike the first is traced alone, forwards and backwards; XLA
  puts the calls into one program again.

  Args:
    ctx: the tokens.
    blocks: a pattern.
    repeat: how often the pattern is run.
    traced: whether it is traced; else layers see numbers, as a debugger wants.
  """
  # What is the same in all calls; flags are no arrays.
  flags = {'train': ctx.train, 'fresh': ctx.fresh}
  arrays = ctx._replace(train=None, fresh=None)

  def run(
    block: Block, stream: jax.Array, past: Any, route: Any, arrays: Context
  ) -> tuple[jax.Array, Any, dict]:
    return block(stream, arrays._replace(routes=route, **flags), past)

  if traced and _some_alike(blocks, repeat):
    run = jax.jit(run)
  return lambda *args: run(*args, arrays)


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
    self,
    blocks: nnx.List,
    stream: jax.Array,
    ctx: Context,
    caches: tuple,
    routes: tuple,
  ) -> tuple[jax.Array, Any, Any]:
    """Runs one segment's repeats.

    Args:
      blocks: the segment's pattern, weights stacked [repeat ...].
      stream: [B T D] or [B T n D].
      ctx: the tokens.
      caches: per block of the pattern, stacked [repeat ...], or None.
      routes: per block, the experts to use [repeat B T K], or None.

    Returns:
      The stream, and the caches and statistics stacked as `caches` is.
    """

    repeat = jax.tree.leaves(blocks)[0].shape[0]
    scanned = self.cfg.compute.scan and repeat > 1
    traced = isinstance(stream, jax.core.Tracer)
    run = _runner(ctx, blocks, 1 if scanned else repeat, traced)

    def body(stream: jax.Array, layer: tuple) -> tuple[jax.Array, tuple]:
      out = []
      # Routes are arguments, so that recomputation replays them, too.
      for block, past, route in zip(*layer):
        stream, past, stats = run(block, stream, past, route)
        out.append((past, stats))
      return stream, tuple(zip(*out))

    body = self._remat(body)
    if scanned:
      stream, (caches, stats) = jax.lax.scan(
        body, stream, (blocks, caches, routes)
      )
      return stream, caches, stats
    # Unrolled: one layer is taken out of the stack at a time.
    each = []
    for i in range(repeat):
      layer = jax.tree.map(lambda a, i=i: a[i], (blocks, caches, routes))
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
    routes = self._routes(ctx)
    for i, blocks in enumerate(self.segments):
      past = cache.layers[i] if cache else (None,) * len(blocks)
      stream, past, stats = self._segment(blocks, stream, ctx, past, routes[i])
      caches.append(past)
      statistics.append(stats)
    return stream, caches, statistics

  def _routes(self, ctx: Context) -> list[tuple]:
    """Returns by segment and block the experts to use [repeat B T K], or None.

    Layers with experts are numbered in order: a pattern's, then its repeat's.
    """
    out, start = [], 0
    for segment in self.cfg.segments():
      has = [hasattr(block.ffn, 'experts') for block in segment.blocks]
      if ctx.routes is None or not any(has):
        out.append((None,) * len(has))
        continue
      end = start + segment.repeat * sum(has)
      part = jnp.moveaxis(ctx.routes[:, :, start:end], 2, 0)
      part = part.reshape(segment.repeat, sum(has), *part.shape[1:])
      own = iter(range(sum(has)))
      out.append(tuple(part[:, next(own)] if h else None for h in has))
      start = end
    return out

  def leave(
    self, stream: jax.Array, ctx: Context, mtp: Ahead, mtp_state: bool = False
  ) -> tuple[jax.Array, dict]:
    """Collapses the stream after the last block.

    Args:
      stream: [B T D] or [B T n D].
      ctx: the tokens.
      mtp: whether to run multi-token prediction, and whom it teaches.
      mtp_state: whether to return what it starts from.

    Returns:
      hidden [B T D], and of `Output.aux` what begins with 'mtp'.
    """
    hidden, aux = self.residual.collapse_normed(stream, self.norm), {}
    # V4 goes on from the streams, V3 from the normed state.
    state = stream if self.cfg.mtp.streams else hidden
    if mtp and self.cfg.mtp.depth:
      aux['mtp'], aux['mtp_hidden'] = self._mtp(state, ctx, mtp)
    if mtp_state:
      aux['mtp_state'] = state
    return hidden, aux

  def __call__(
    self,
    ctx: Context,
    cache: Cache | None,
    mtp: Ahead,
    mtp_state: bool = False,
  ) -> Output:
    """Returns logits, hidden states, cache and statistics of a batch.

    Args:
      ctx: the tokens.
      cache: what is cached of earlier tokens, or None.
      mtp: whether to run multi-token prediction, and whom it teaches.
      mtp_state: whether to return what it starts from.
    """
    # Rows of Engram tables [B T L K], unless the data pipeline hashed them.
    ctx, recent = self.hashed(ctx, cache)
    # Embedding and all blocks: [B T D] or, with hyper-connections, [B T n D].
    stream, caches, statistics = self.through(self.enter(ctx), ctx, cache)
    # Collapse and final norm: [B T D]; then the blocks that predict further.
    hidden, aux = self.leave(stream, ctx, mtp, mtp_state)
    aux = {'segments': statistics, **aux}
    # Logits [B T V], float32: a loss subtracts them from their log-sum-exp.
    logits = self.logits(hidden)
    if cache:
      cache = cache.after(ctx, tuple(caches), recent)
    return Output(logits, hidden, cache, aux)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns the head's logits [B T V], float32, of hidden [B T D]."""
    return jnp.einsum(
      'BTD,DV->BTV',
      hidden,
      self.head_weight(),
      preferred_element_type=jnp.float32,
    )

  def draft(
    self, state: jax.Array, ctx: Context, cache: Cache, depth: int
  ) -> Draft:
    """Predicts with the block of one depth, or with the last one; see `build`.

    Args:
      state: [B T D] or [B T n D], of the depth before.
      ctx: the tokens ahead, at the places that predict.
      cache: of all depths.
      depth: from 1.
    """
    at = min(depth, len(self.mtp)) - 1
    layers, ((past,),) = list(cache.layers), cache.layers[at : at + 1]
    # A depth is a segment of one block, its arrays are stacked [1 B S ...].
    past = jax.tree.map(lambda a: a[0], past)
    module = self.mtp[at]
    state, past, _ = module(state, self.embedded(ctx.tokens), ctx, past)
    layers[at] = (jax.tree.map(lambda a: a[None], past),)
    logits = self.logits(module.readout(state))
    return Draft(logits, state, cache.after(ctx, tuple(layers), None))

  def _mtp(
    self, state: jax.Array, ctx: Context, mtp: Ahead
  ) -> tuple[list[dict], list[jax.Array]]:
    """Runs the depths of MTP: (statistics, states for the head [B T D])."""
    statistics, states = [], []
    alone = jax.lax.stop_gradient if mtp == 'alone' else lambda x: x
    state = alone(state)
    ctx = ctx._replace(routes=None)  # the sampler's draft is another token's
    for depth, module in enumerate(self.mtp, start=1):
      # Depth k embeds the token k places on, at the place that predicts.
      at = shifted(ctx, depth)
      ahead = alone(self.embedded(at.tokens))
      state, _, stats = module(state, ahead, at)
      statistics.append(stats)
      states.append(module.readout(state))
    return statistics, states
