"""Builds the transformer: a configuration becomes pure functions over dicts.

A model is data (see transformer_config); its layers are run by network.py.
Legend: B batch, T tokens, D model, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import key
from deepseek_jax.errors import InputError
from deepseek_jax.model import drafting, kernels, lora
from deepseek_jax.model import given as inputs
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import Context, context
from deepseek_jax.model.drafting import Draft
from deepseek_jax.model.functional import functional
from deepseek_jax.model.network import Output, Transformer
from deepseek_jax.model.stacks import empty_cache
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
    for f in (build, functional, lora.adapted, drafting.functions)
  )


def _check(config: Any) -> None:
  """Raises InputError for what is no configuration of a model."""
  if not isinstance(config, TransformerConfig):
    raise InputError(
      f'config: {config!r} is no TransformerConfig; presets are functions that'
      ' make one, as ds.presets.v3_tiny()'
    )


def _context(
  config: TransformerConfig,
  given: inputs.Given,
  cache: Cache | None,
  train: bool,
) -> Context:
  """Returns what the layers read of a call's arrays."""
  fresh, positions = cache is None or cache.fresh, given.positions
  if positions is None and not fresh:
    # Later calls go on after the cached tokens of each row.
    positions = cache.length[:, None] + jnp.arange(given.tokens.shape[1])
  ctx = context(
    given.tokens,
    given.segment_ids,
    config.vocab_size,
    positions=positions,
    rows=given.ngrams,
    before=given.before,
    cached=cache is not None,
    train=train,
    fresh=fresh,
  )
  return ctx._replace(routes=given.routes)


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
      before a row's first, in order, if not those that the cache saw last.
    routes: [B T L K] int32, experts of each token in each layer that has some,
      weighted by live scores; -1 leaves them to the router (hash, MTP: always).

  init_mtp_cache and draft: see `drafting.functions`.

  Raises:
    InputError: `config` is no TransformerConfig.
  """
  _check(config)
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
    given = inputs.Given(tokens, positions, segment_ids, ngrams, before, routes)
    inputs.check(config, given, cache)
    ctx = _context(config, given, cache, train)
    with kernels.using(config.compute.kernels):
      return merge(cast(variables))(ctx, cache, mtp, mtp_state)

  empty = lambda config, *sizes: empty_cache(config, dtype, *sizes)
  drafts = drafting.functions(config, lambda v: merge(cast(v)), empty)
  head = lambda variables: merge(cast(variables)).head_weight()
  init_cache = lambda batch, slots, spare=0: empty(config, batch, slots, spare)
  return Model(config, init, apply, init_cache, head, cast, abstract, *drafts)
