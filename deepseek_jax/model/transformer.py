"""Builds the transformer: a configuration becomes pure functions over dicts.

A model is data (see transformer_config); its layers are run by network.py.
Legend: B batch, T tokens, D model, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import key
from deepseek_jax.errors import InputError
from deepseek_jax.model import given as inputs
from deepseek_jax.model import kernels, lora
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import context
from deepseek_jax.model.functional import functional
from deepseek_jax.model.network import Draft, Output, Transformer
from deepseek_jax.model.stacks import empty_cache, empty_mtp_cache
from deepseek_jax.model.transformer_config import TransformerConfig


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


def build(config: TransformerConfig) -> Model:
  """Makes the pure functions of a model; allocates no array.

  apply(variables, tokens, *, positions=None, segment_ids=None, cache=None,
  train=False, mtp=False, mtp_state=False, ngrams=None, before=None,
  routes=None) -> Output, with
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
    routes: [B T L K] int32, the experts of each token in each layer with
      experts, in order: they are used, and weighted by the live scores. A token
      whose experts are -1 in a layer is routed there as ever; so is it where
      the token itself decides, and in the blocks of multi-token prediction.

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
    routes: jax.Array | None = None,
  ) -> Output:
    given = inputs.Given(
      tokens, positions, segment_ids, ngrams, before, routes
    )
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
    ctx = ctx._replace(routes=routes)
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
    return empty_cache(config, dtype, batch, slots, spare)

  def init_mtp_cache(batch: int, slots: int, spare: int = 0) -> Cache:
    return empty_mtp_cache(config, dtype, batch, slots, spare)

  head = lambda variables: merge(cast(variables)).head_weight()
  return Model(
    config, init, apply, init_cache, head, cast, abstract, init_mtp_cache, draft
  )
