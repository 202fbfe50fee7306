"""Builds the transformer: a configuration becomes pure functions over dicts.

A model is data (see transformer_config); its layers are run by network.py.
Legend: B batch, T tokens, D model, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import key, kind_name
from deepseek_jax.errors import InputError, told
from deepseek_jax.model import calls, drafting, kernels, lora
from deepseek_jax.model import given as inputs
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.context import Context, context
from deepseek_jax.model.drafting import Draft
from deepseek_jax.model.functional import functional
from deepseek_jax.model.mtp import Ahead
from deepseek_jax.model.network import Output, Transformer
from deepseek_jax.model.stacks import empty_cache
from deepseek_jax.model.transformer_config import TransformerConfig


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """Holds a transformer as pure functions over plain nested dicts.

  Two that `build` made of equal configurations are equal, and so share what
  was compiled for one of them.

  Attributes:
    config: the model's configuration.
    init: key -> {'params': {...}, 'buffers': {...}}, float32.
    apply: (variables, tokens [B T], ...) -> Output; see its own help.
    init_cache: (batch, slots, spare=0) -> empty Cache in the compute dtype,
      whose rows may be rewound by `spare` tokens, see `Cache.rewound`.
    init_mtp_cache: the same for the blocks of multi-token prediction, a
      segment for each depth.
    draft: see its own help.
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

  def __repr__(self) -> str:
    """Returns one line: shapes, the kind of attention, parameters."""
    cfg = self.config
    sizes = [math.prod(a.shape) for a in jax.tree.leaves(self.abstract)]
    layers = [layer.block.attention for layer in cfg.in_order()]
    kinds = '/'.join(dict.fromkeys(kind_name(type(one)) for one in layers))
    moe = cfg.moe
    experts = f', {moe.top_k} of {moe.experts} experts' if moe else ''
    return (
      f'Model({cfg.layers} layers of width {cfg.dim}, {kinds}{experts},'
      f' vocabulary {cfg.vocab_size}: {sum(sizes):,} weights,'
      f' {cfg.compute.products})'
    )

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
    for f in (build, _apply, functional, lora.adapted, drafting.functions)
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


def _apply(
  config: TransformerConfig, call: Callable, check: Callable[[dict], None]
) -> Callable[..., Output]:
  """Returns `Model.apply` of the module that `call` makes of variables."""

  def apply(
    variables: dict,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: Cache | None = None,
    train: bool = False,
    mtp: Ahead = False,
    mtp_state: bool = False,
    ngrams: jax.Array | None = None,
    before: jax.Array | None = None,
    routes: jax.Array | None = None,
  ) -> Output:
    check(variables)
    given = inputs.Given(tokens, positions, segment_ids, ngrams, before, routes)
    inputs.check(config, given, cache)
    ctx = _context(config, given, cache, train)
    with kernels.using(config.compute.kernels, config.compute.products):
      return call(variables)(ctx, cache, mtp, mtp_state)

  apply.__doc__ = calls.APPLY
  return apply


def build(config: TransformerConfig) -> Model:
  """Makes the pure functions of a model; allocates no array.

  `help(model.apply)` and `help(model.draft)` say what they take.

  Raises:
    InputError: `config` is no TransformerConfig.
  """
  _check_config(config)
  make = lambda key: Transformer(config, rngs=nnx.Rngs(key))
  dtype = jnp.dtype(config.compute.products)
  abstract, drawn, _, merge, cast = functional(make, dtype, config.lora)
  if config.lora is not None:
    lora.check(abstract['params'], config.lora)
  check = functools.partial(inputs.variables, _shapes(config, abstract))

  def init(key: jax.Array | int) -> dict:
    """Returns fresh variables of a random key, or of its seed.

    {'params': {...}, 'buffers': {...}}, nested dicts of float32 arrays, and of
    integers in tables.
    """
    return drawn(inputs.random_key(key))

  call = lambda variables: merge(cast(variables))
  apply = _apply(config, call, check)

  def init_cache(batch: int, slots: int, spare: int = 0) -> Cache:
    """Returns an empty cache for `batch` rows of `slots` tokens."""
    inputs.sizes(batch=batch, slots=slots)
    return empty_cache(config, dtype, batch, slots, spare)

  def head(variables: dict) -> jax.Array:
    """Returns [D V], what turns `Output.hidden` into logits."""
    check(variables)
    return call(variables).head_weight()

  def ready(variables: dict) -> dict:
    """Returns variables in the compute dtype, adapters folded in."""
    check(variables)
    return cast(variables)

  def checked(variables: dict) -> Transformer:
    check(variables)
    return call(variables)

  empty = lambda config, *sizes: empty_cache(config, dtype, *sizes)
  drafts = drafting.functions(config, checked, empty)
  drafts.draft.__doc__ = calls.DRAFT
  return Model(config, init, apply, init_cache, head, ready, abstract, *drafts)


def _check_config(config: Any) -> None:
  """Raises InputError for what is no TransformerConfig, with what to give."""
  if isinstance(config, TransformerConfig):
    return
  fix = 'ds.presets.v3_tiny() makes one'
  if isinstance(getattr(config, 'model', None), TransformerConfig):
    fix = 'give its model, config.model'
  elif isinstance(config, Model):
    fix = 'give its configuration, model.config'
  elif callable(config):
    fix = f'call it: {getattr(config, "__name__", "")}()'
  elif isinstance(config, Mapping):
    fix = 'ds.from_dict(ds.TransformerConfig, config) makes one'
  raise InputError(f'config: is {told(config)}, no TransformerConfig; {fix}')


def _shapes(config: TransformerConfig, abstract: dict) -> dict:
  """Returns the trees of arrays that a model's functions take.

  With adapters, or with these folded in: then any tree will do.
  """
  if config.lora is not None:
    return dict.fromkeys(abstract)
  return {kind: nnx.to_pure_dict(state) for kind, state in abstract.items()}
