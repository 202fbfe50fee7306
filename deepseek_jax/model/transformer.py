"""Builds the transformer: the only place that knows the order of layers.

A model is data: `TransformerConfig` holds one sub-config per idea and a layout
that names kinds of blocks; it expands into segments, short patterns of blocks
that repeat and are scanned over. `build` turns it into pure functions.
Legend: B batch, T tokens, D model, V vocabulary, L layers, n streams.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least, changed_by, check_choices, key
from deepseek_jax.errors import InputError
from deepseek_jax.model import given as inputs
from deepseek_jax.model import kernels, lookup, lora
from deepseek_jax.model.block import AttentionConfig, Block, BlockConfig
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import Context, context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.lora import LoRAConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.memory.ngram_hash import NGramHash
from deepseek_jax.model.mtp import MTPConfig, shifted
from deepseek_jax.model.norm import RMSNorm
from deepseek_jax.model.residual import ResidualConfig
from deepseek_jax.parallel.sharding import Buffer, param, shard


@dataclasses.dataclass(frozen=True)
class Kind:
  """Describes a kind of block that a layout can name.

  Attributes:
    ffn: which sub-config is its FFN, 'ffn' (dense) or 'moe'.
    change: where it departs from the model's sub-configs, as pairs of a
      dotted field and a value: (('attention.rope.theta', 160000.0),).
    engram: whether it begins with an Engram.
  """

  ffn: Literal['ffn', 'moe'] = 'moe'
  change: tuple = ()
  engram: bool = False

  def __post_init__(self):
    """Raises InputError unless `change` is a sequence of pairs."""
    some = isinstance(self.change, tuple | list)
    pair = lambda c: isinstance(c, tuple | list) and len(c) == 2
    if not some or not all(pair(c) and type(c[0]) is str for c in self.change):
      raise InputError(
        f"kind.change = {self.change!r}: write pairs, (('field', value),)"
      )


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """Describes how the same numbers are computed.

  Attributes:
    dtype: of activations and matmuls; norms, router and softmax stay float32.
      On a GPU JAX multiplies float32 as TF32 (10 bits of mantissa) unless
      jax_default_matmul_precision says otherwise; only the products of router
      and hyper-connections ask for all of float32.
    scan: layers of a segment are scanned over (else unrolled).
    remat: what the backward pass recomputes: nothing, all but matmul
      outputs, or whole layers.
    kernels: None takes kernels where the device has them, and the layers' own
      code elsewhere; 'gpu' and 'reference' force them or what they are
      checked against.
  """

  dtype: Literal['float32', 'bfloat16'] = 'float32'
  scan: bool = True
  remat: Literal['none', 'dots', 'full'] = 'none'
  kernels: Literal['reference', 'gpu'] | None = None

  def __post_init__(self):
    """Raises InputError for an unknown choice of kernels."""
    if self.kernels not in (None, 'reference', 'gpu'):
      raise InputError(
        f"compute.kernels = {self.kernels!r}: use None, 'reference' or 'gpu'"
      )


@dataclasses.dataclass(frozen=True)
class Segment:
  """Holds a pattern of blocks, applied `repeat` times."""

  blocks: tuple[BlockConfig, ...]
  repeat: int


class Layer(NamedTuple):
  """Describes one layer of a model, and where its variables lie.

  Attributes:
    number: in order, from 0.
    segment, place: its variables are below ['segments'][segment][place] ...
    repeat: ... at this index of their leading axis.
    block: its configuration.
  """

  number: int
  segment: int
  place: int
  repeat: int
  block: BlockConfig

  def of(self, tree: Mapping, default: Any = None) -> Any:
    """Returns what a tree of variables has of this layer's stack."""
    segments = tree.get('segments', {})
    return segments.get(self.segment, {}).get(self.place, default)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Describes everything about a model.

  Attributes:
    vocab_size: V.
    dim: D.
    layout: pairs (names of kinds, repeat), e.g.
      ((('dense',), 3), (('moe',), 58)).
    attention, ffn, moe, residual: the shared sub-configs, one per idea.
    kinds: the kinds that the layout's names stand for.
    mtp: multi-token prediction.
    engram: the Engram of the kinds that have one.
    lora: weights that learn a low-rank product; the rest is then frozen, unless
      train.trainable names it.
    norm_eps: of the block norms and the final norm.
    init_std: of every weight matrix at initialisation.
    tied: embedding and head are one matrix.
    compute: how, not what, is computed.
  """

  vocab_size: int
  dim: int
  layout: tuple
  attention: AttentionConfig
  ffn: FFNConfig | None = None
  moe: MoEConfig | None = None
  residual: ResidualConfig | HyperConnectionsConfig = ResidualConfig()
  kinds: dict[str, Kind] = dataclasses.field(
    default_factory=lambda: {'dense': Kind('ffn'), 'moe': Kind('moe')}
  )
  mtp: MTPConfig = MTPConfig(depth=0)
  engram: EngramConfig | None = None
  lora: LoRAConfig | None = None
  norm_eps: float = 1e-6
  init_std: float = 0.006
  tied: bool = False
  compute: ComputeConfig = ComputeConfig()

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    check_choices(self)
    at_least(self, vocab_size=1, dim=1, init_std=0)
    above(self, norm_eps=0)
    if not isinstance(self.kinds, Mapping):
      raise InputError(f'kinds = {self.kinds!r}: must be a dict of Kinds')
    if not isinstance(self.lora, LoRAConfig | None):
      raise InputError(f'lora = {self.lora!r}: must be a LoRAConfig or None')
    if not self.layout:
      raise InputError('layout = (): name at least one block')
    flat = isinstance(self.residual, ResidualConfig)
    if self.mtp.depth and self.mtp.streams and flat:
      raise InputError(
        'mtp.streams = True: the residual has one stream; use'
        ' hyper-connections or mtp.streams = False'
      )
    if self.mtp.depth and self.block(self.mtp.block).engram:
      raise InputError(
        f'mtp.block = {self.mtp.block!r}: has a memory, which prediction'
        ' blocks cannot have; choose a kind with engram = False'
      )
    for block in [b for s in self.segments() for b in s.blocks]:
      check_choices(block)  # kinds may change whole parts
      router = getattr(block.ffn, 'router', None)
      hashed = getattr(router, 'hash_vocab', 0)
      if hashed not in (0, self.vocab_size):
        raise InputError(
          f'router.hash_vocab = {hashed}: must be vocab_size ='
          f' {self.vocab_size}, or 0'
        )

  @property
  def layers(self) -> int:
    """Returns L, without the blocks of multi-token prediction."""
    return sum(len(s.blocks) * s.repeat for s in self.segments())

  def block(self, name: str) -> BlockConfig:
    """Returns the configuration of the block that the layout calls `name`.

    Raises:
      InputError: an unknown name, or a kind that lacks its sub-config.
    """
    if name not in self.kinds:
      raise InputError(
        f'layout names {name!r}: not one of kinds = {sorted(self.kinds)}'
      )
    kind = self.kinds[name]
    if not isinstance(kind, Kind):
      raise InputError(f'kinds.{name} = {kind!r}: must be a Kind')
    parts = {
      'attention': self.attention,
      'ffn': self.ffn,
      'moe': self.moe,
      'residual': self.residual,
    }
    for path, _ in kind.change:
      top = path.partition('.')[0]
      if top not in parts:
        raise InputError(f'kinds.{name}.change: no sub-config {top!r}')
    # Changes reach into sub-configs; the model's own stay as they are.
    parts = changed_by(parts, kind.change)
    ffn = parts[kind.ffn]
    if ffn is None:
      raise InputError(
        f'layout names {name!r}, which needs {kind.ffn} = ...: it is None'
      )
    if not kind.engram:
      return BlockConfig(
        parts['attention'], ffn, parts['residual'], self.norm_eps
      )
    if self.engram is None:
      raise InputError(
        f'kinds.{name}.engram = True: needs engram = ...: it is None'
      )
    return BlockConfig(
      parts['attention'],
      ffn,
      parts['residual'],
      self.norm_eps,
      self.engram,
      self.engram.rows(len(self.engram_layers())),
    )

  def in_order(self) -> tuple[Layer, ...]:
    """Returns all layers as tokens pass through them."""
    places = (
      (i, j, repeat, block)
      for i, segment in enumerate(self.segments())
      for repeat in range(segment.repeat)
      for j, block in enumerate(segment.blocks)
    )
    return tuple(Layer(n, *place) for n, place in enumerate(places))

  def engram_layers(self) -> tuple[int, ...]:
    """Returns the numbers of the layers with an Engram, in order."""
    names = [n for names, repeat in self.layout for n in names * repeat]
    has = lambda name: name in self.kinds and self.kinds[name].engram
    return tuple(i for i, name in enumerate(names) if has(name))

  def segments(self) -> tuple[Segment, ...]:
    """Returns the layout with its names looked up.

    Raises:
      InputError: an entry that is no pair of names and a positive number.
    """
    out = []
    for entry in self.layout:
      try:
        names, repeat = entry
        ok = not isinstance(names, str) and int(repeat) == repeat > 0
      except (TypeError, ValueError, OverflowError):
        ok = False
      if not ok:
        raise InputError(
          f"layout entry {entry!r}: write (('kind', ...), repeat)"
        )
      out.append(Segment(tuple(self.block(n) for n in names), int(repeat)))
    return tuple(out)


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


class Draft(NamedTuple):
  """Holds what a block of multi-token prediction predicts.

  Attributes:
    logits: [B T V] float32, of the token after the one that was given.
    state: [B T D] or [B T n D], what the next depth takes of each place.
    cache: the cache of these blocks with these tokens.
  """

  logits: jax.Array
  state: jax.Array
  cache: Cache


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
    self, stream: jax.Array, ctx: Context, mtp: bool, mtp_state: bool = False
  ) -> tuple[jax.Array, dict]:
    """Collapses the stream after the last block.

    Args:
      stream: [B T D] or [B T n D].
      ctx: the tokens.
      mtp: whether to run multi-token prediction.
      mtp_state: whether to return what it starts from.

    Returns:
      hidden [B T D], and of `Output.aux` what begins with 'mtp'.
    """
    hidden, aux = self.norm(self.residual.collapse(stream)), {}
    # V4 goes on from the streams, V3 from the normed state.
    state = stream if self.cfg.mtp.streams else hidden
    if mtp and self.cfg.mtp.depth:
      aux['mtp'], aux['mtp_hidden'] = self._mtp(state, ctx)
    if mtp_state:
      aux['mtp_state'] = state
    return hidden, aux

  def __call__(
    self,
    ctx: Context,
    cache: Cache | None,
    mtp: bool,
    mtp_state: bool = False,
  ) -> Output:
    """Returns logits, hidden states, cache and statistics of a batch.

    Args:
      ctx: the tokens.
      cache: what is cached of earlier tokens, or None.
      mtp: whether to run multi-token prediction.
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
    self, state: jax.Array, ctx: Context
  ) -> tuple[list[dict], list[jax.Array]]:
    """Runs the depths of MTP: (statistics, states for the head [B T D])."""
    statistics, states = [], []
    for depth, module in enumerate(self.mtp, start=1):
      # Depth k embeds the token k places on, at the place that predicts.
      at = shifted(ctx, depth)
      state, _, stats = module(state, self.embedded(at.tokens), at)
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
    init_cache: (batch, slots, spare=0) -> empty Cache in the compute dtype,
      whose rows may be rewound by `spare` tokens, see `Cache.rewound`.
    init_mtp_cache: the same for the blocks of multi-token prediction, a
      segment for each depth.
    draft: see `build`.
    head: variables -> [D V], what turns `hidden` into logits.
    cast: variables -> the same in the compute dtype, except the parameters
      that stay float32, and without adapters, which are folded into their
      weights; apply does it too, so do it once before a loop.
    abstract: key-free nnx.State of shapes, dtypes and axis names.
  """

  config: TransformerConfig
  init: Callable[[jax.Array], dict]
  apply: Callable[..., Output]
  init_cache: Callable[..., Cache]
  head: Callable[[dict], jax.Array]
  cast: Callable[[dict], dict]
  abstract: dict[str, nnx.State]
  init_mtp_cache: Callable[..., Cache]
  draft: Callable[..., Draft]

  @functools.cached_property
  def _key(self) -> tuple:
    """Returns what equal models share: configuration and functions."""
    # What `build` made is as the configuration says; a function that a user
    # put in its place is itself.
    one = lambda f: f.__qualname__ if _built(f) else f
    functions = self.init, self.apply, self.init_cache, self.head, self.cast
    drafting = self.init_mtp_cache, self.draft
    return key(self.config), *map(one, functions + drafting)

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


class Functional(NamedTuple):
  """Holds a module as pure functions, see `functional`.

  Attributes:
    abstract, init: as in Model.
    cast: variables -> the same in the compute dtype, adapters still apart.
    merge: variables -> module.
    ready: variables -> as `Model.cast`: adapters folded in.
  """

  abstract: dict[str, nnx.State]
  init: Callable[[jax.Array], dict]
  cast: Callable[[dict], dict]
  merge: Callable[[dict], nnx.Module]
  ready: Callable[[dict], dict]


def functional(
  make: Callable[[jax.Array], nnx.Module],
  dtype: jax.typing.DTypeLike,
  adapters: LoRAConfig | None = None,
  first: tuple[int, ...] = (),
) -> Functional:
  """Takes a module apart into functions of plain dicts; allocates no array.

  Args:
    make: key -> module.
    dtype: in which it is computed.
    adapters: of its weights, if any.
    first: see `lora.adapted`.
  """
  # Shapes and dtypes alone: nothing is drawn.
  abstract = jax.eval_shape(make, jax.random.key(0))
  graphdef, params, buffers = nnx.split(abstract, nnx.Param, Buffer)

  def init(key: jax.Array) -> dict:
    _, params, buffers = nnx.split(make(key), nnx.Param, Buffer)
    return {
      'params': nnx.to_pure_dict(params),
      'buffers': nnx.to_pure_dict(buffers),
    }

  is_variable = lambda v: isinstance(v, nnx.Variable)
  # Which parameters stay float32: a tree of bools like the parameters.
  kept = nnx.to_pure_dict(
    jax.tree.map(
      lambda v: v.replace(v.get_metadata().get('full_precision', False)),
      params,
      is_leaf=is_variable,
    )
  )

  def cast(variables: dict) -> dict:
    one = lambda p, keep: p.astype(jnp.float32 if keep else dtype)
    return {**variables, 'params': jax.tree.map(one, variables['params'], kept)}

  def merge(variables: dict) -> nnx.Module:
    return nnx.merge(graphdef, variables['params'], variables['buffers'])

  abstract = {'params': params, 'buffers': buffers}
  made = Functional(abstract, init, cast, merge, ready=cast)
  return made if adapters is None else lora.adapted(made, adapters, first)


def build(config: TransformerConfig) -> Model:
  """Makes the pure functions of a model; allocates no array.

  apply(variables, tokens, *, positions=None, segment_ids=None, cache=None,
  train=False, mtp=False, mtp_state=False, ngrams=None, before=None) -> Output,
  with
    tokens: [B T] int32, each 0..V - 1 except on padding, where it may be
      anything. Another number is an InputError; inside jit, where it can't be
      known, it gives NaN logits in its row and changes no other.
    positions: [B T] int32; by default those after the cached tokens, or from 0
      within each document.
    segment_ids: [B T] int32. A run of equal ids is a document, which attends
      to no other: the same id further on is another document. 0 (or less) is
      padding, which is cached, routed and counted nowhere. None: all of a row
      is one document.
    cache: from `init_cache` or an earlier Output; its slots are positions, and
      a row may go on before its last token (`Cache.rewound`). With one, a row
      is one document: segment_ids tell its tokens, 1, from the padding around
      them, 0; after the first call padding comes last. More documents in a row
      are an InputError, and NaN logits in that row inside jit: decode a packed
      row as rows of their own.
    train: applies what is for training only (capacity).
    mtp: runs the multi-token prediction blocks too.
    mtp_state: puts into aux what these blocks start from, for `draft`.
    ngrams: [B T L K] int32, rows of the Engrams' tables that the data
      pipeline has hashed; by default they are hashed here, to the same. What
      is no row is treated as what is no token.
    before: [B N-1] int32, of a model with Engrams and a cache: the tokens
      before a row's first one, in order, instead of those that the cache has
      seen last. What would lie before a document may be anything.

  draft(variables, state, tokens, cache, positions, valid=None, *, depth=1) ->
  Draft runs the block of multi-token prediction of a depth, with
    state: `aux['mtp_state']` of [B T] tokens for depth 1, and for others the
      state that the depth before has drafted.
    tokens: [B T] int32, the token `depth` places on from each.
    cache: from `init_mtp_cache` or an earlier Draft.
    positions: [B T] int32 of the states, not of the tokens ahead.
    valid: [B T] bool, False on padding, which comes last.
    depth: more than there are repeat the last block. Each repetition goes on
      one position: it takes the drafted state for that of the next token.

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
    mtp_state: bool = False,
    ngrams: jax.Array | None = None,
    before: jax.Array | None = None,
  ) -> Output:
    given = inputs.Given(tokens, positions, segment_ids, ngrams, before)
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
      before=before,
      cached=cache is not None,
      train=train,
      fresh=fresh,
    )
    with kernels.using(config.compute.kernels):
      return merge(cast(variables))(ctx, cache, mtp, mtp_state)

  def draft(
    variables: dict,
    state: jax.Array,
    tokens: jax.Array,
    cache: Cache,
    positions: jax.Array,
    valid: jax.Array | None = None,
    *,
    depth: int = 1,
  ) -> Draft:
    segments = None if valid is None else jnp.asarray(valid, jnp.int32)
    given = inputs.Given(tokens, positions, segments)
    inputs.check_draft(config, given, cache, state, depth)
    ctx = context(
      tokens,
      segments,
      config.vocab_size,
      positions=positions,
      cached=True,
      fresh=cache.fresh,
    )
    with kernels.using(config.compute.kernels):
      return merge(cast(variables)).draft(state, ctx, cache, depth)

  def init_cache(batch: int, slots: int, spare: int = 0) -> Cache:
    return _empty_cache(config, dtype, batch, slots, spare)

  def init_mtp_cache(batch: int, slots: int, spare: int = 0) -> Cache:
    return _empty_mtp_cache(config, dtype, batch, slots, spare)

  head = lambda variables: merge(cast(variables)).head_weight()
  return Model(
    config, init, apply, init_cache, head, cast, abstract, init_mtp_cache, draft
  )


def _empty_cache(
  config: TransformerConfig,
  dtype: jnp.dtype,
  batch: int,
  slots: int,
  spare: int,
) -> Cache:
  """Returns a cache that holds no token yet, for rows of `slots` tokens."""
  if spare < 0:
    raise InputError(f'spare = {spare}: must be at least 0')
  layers = []
  for segment in config.segments():
    one = lambda b: b.cache(batch, slots, config.dim, dtype, spare)
    empty = [one(b) for b in segment.blocks]
    # As the weights: every array of a segment is stacked [repeat ...].
    stack = lambda a, n=segment.repeat: jnp.zeros((n, *a.shape), a.dtype)
    layers.append(tuple(jax.tree.map(stack, empty)))
  recent = None
  if config.engram_layers():
    recent = jnp.zeros((batch, config.engram.longest + spare), jnp.int32)
  length = jnp.zeros(batch, jnp.int32)
  return Cache(tuple(layers), length, slots, recent=recent)


def _empty_mtp_cache(
  config: TransformerConfig,
  dtype: jnp.dtype,
  batch: int,
  slots: int,
  spare: int,
) -> Cache:
  """Returns the same for the blocks of multi-token prediction, one per depth.

  It is read from the first call on: one program serves all calls.
  """
  inputs.check_depth(config)
  depths = dataclasses.replace(
    config,
    layout=(((config.mtp.block,), 1),) * config.mtp.depth,
    engram=None,
  )
  cache = _empty_cache(depths, dtype, batch, slots, spare)
  return dataclasses.replace(cache, fresh=False)


def unstack(
  config: TransformerConfig, variables: dict | None = None
) -> TransformerConfig | dict:
  """Returns the same model with every layer a segment of its own.

  Decoding wants it: taking a layer out of a stack copies its weights.

  Args:
    config: a model's configuration.
    variables: its variables, to be taken apart too.

  Returns:
    The new configuration, or the new variables if `variables` are given.
  """
  if variables is None:
    names = [n for names, repeat in config.layout for n in names * repeat]
    layout = tuple(((name,), 1) for name in names)
    return dataclasses.replace(config, layout=layout)

  def apart(tree: dict) -> dict:
    if 'segments' not in tree:
      return tree
    layers = {}
    for layer in config.in_order():
      stack, r = layer.of(tree), layer.repeat
      if stack is not None:  # a dense block has no buffers
        one = jax.tree.map(lambda a, r=r: a[r : r + 1], stack)
        layers[layer.number] = {0: one}
    return {**tree, 'segments': layers}

  return {kind: apart(tree) for kind, tree in variables.items()}


def moe_statistics(aux: dict, name: str) -> jax.Array | None:
  """Returns one MoE statistic of all layers in order, [L_moe, ...].

  None without MoE layers. `aux` is that of an Output.
  """
  out = []
  for patterns in aux['segments']:
    picked = [s['ffn'][name] for s in patterns if name in s['ffn']]
    if picked:
      stacked = jnp.stack(picked, axis=1)  # [repeat, blocks, ...]
      out.append(stacked.reshape(-1, *stacked.shape[2:]))
  return jnp.concatenate(out) if out else None
