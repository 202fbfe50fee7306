"""Checks what a caller gives to a model, as far as the values are known.

Inside jit they are not known: there shapes and dtypes alone are checked, and
what is wrong becomes NaN logits (see `context.context` and `lookup.rows`).
Legend: B batch, T tokens, L layers with an Engram, K rows of a token.
"""

import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import InputError, told
from deepseek_jax.model.cache import Cache
from deepseek_jax.parallel.sharding import known


class Given(NamedTuple):
  """Holds the arrays of a call; see `Model.apply`."""

  tokens: Any  # [B T]
  positions: Any = None  # [B T] or None
  segment_ids: Any = None  # [B T] or None
  ngrams: Any = None  # [B T L K] or None
  before: Any = None  # [B N-1] or None
  routes: Any = None  # [B T L K] or None, of layers with experts


def check(config: Any, given: Given, cache: Cache | None) -> None:
  """Raises InputError for arrays that the model of `config` can't read.

  Args:
    config: a TransformerConfig.
    given: the arrays.
    cache: the cache that they are to be written to, or None.
  """
  _check(config, given, cache)
  _check_before(config, given, cache)
  _check_routes(config, given)


def _check(config: Any, given: Given, cache: Cache | None) -> None:
  """Raises InputError for what is wrong with the tokens and their places."""
  _check_arrays(given)
  if cache is not None:
    if not isinstance(cache, Cache):
      raise InputError(
        f'cache: is {told(cache)}; give what model.init_cache(batch, slots) or'
        ' an earlier call returned'
      )
    _check_slots(given, cache)
  segments = None
  if given.segment_ids is not None:
    segments = known(given.segment_ids)
    if segments is None:
      return
    _check_segments(segments)
    if cache is not None:
      _check_one_document(segments, given.positions, cache.fresh)
  # What padding holds may be anything, so only real tokens are checked.
  real = None if segments is None else segments > 0
  _check_range('tokens', given.tokens, config.vocab_size, 'vocabulary', real)
  if given.ngrams is not None and config.engram is not None:
    rows = config.engram.rows(len(config.engram_layers()))
    _check_range('ngrams', given.ngrams, rows, 'the Engram tables', real)


def check_depth(config: Any) -> None:
  """Raises InputError for a model that has no block to draft with."""
  if not config.mtp.depth:
    raise InputError(
      'mtp.depth = 0: this model has no block of multi-token prediction to'
      ' draft with'
    )


def check_draft(
  config: Any, given: Given, cache: Cache, state: Any, depth: int
) -> None:
  """Raises InputError for what can't be drafted from.

  Args:
    config: a TransformerConfig.
    given: the arrays.
    cache: of the blocks that draft.
    state: [B T D] or [B T n D].
    depth: from 1.
  """
  check_depth(config)
  if depth < 1:
    raise InputError(f'depth = {depth}: must be at least 1')
  _check(config, given, cache)
  streams = (config.residual.streams,) if config.mtp.streams else ()
  shape = *given.tokens.shape, *streams, config.dim
  if getattr(state, 'shape', None) != shape:
    raise InputError(
      f'state: {_shape(state)}; must be {list(shape)}, what apply(mtp_state='
      "True) puts into aux['mtp_state']"
    )


def variables(abstract: Mapping[str, Any], given: Any) -> None:
  """Checks that variables are those of a model.

  Args:
    abstract: {'params', 'buffers'}, trees with the shapes that they have; of
      None any tree will do.
    given: what the caller has.

  Raises:
    InputError: they are not; names the first array that differs.
  """
  wanted = ', '.join(repr(name) for name in abstract)
  named = isinstance(given, Mapping)
  lacks = not named or [k for k in abstract if k not in given]
  if lacks:
    kind = told(given)
    if isinstance(given, Mapping):
      kind = f'a dict without {lacks[0]!r}'
    raise InputError(
      f'variables: {kind}; give what model.init returned, a dict of {wanted}'
    )
  for kind, like in abstract.items():
    if like is None or _same(like, given[kind]):
      continue
    have, want = _shapes(given[kind]), _shapes(like)
    for path in dict.fromkeys([*want, *have]):
      mine, theirs = want.get(path), have.get(path)
      if mine != theirs:
        raise InputError(
          f'variables: {kind}{path} is {_size(theirs)} here and {_size(mine)}'
          ' in the model: they are of another one; build it from their'
          ' configuration'
        )


def _same(one: Any, other: Any) -> bool:
  """Returns whether two trees have arrays of equal shapes in equal places."""
  (mine, like), (theirs, form) = map(jax.tree.flatten, (one, other))
  return like == form and all(
    map(lambda a, b: np.shape(a) == np.shape(b), mine, theirs)
  )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a tree's arrays by path, as in ['embed']."""
  return {
    jax.tree_util.keystr(path): tuple(np.shape(leaf))
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def _size(shape: tuple[int, ...] | None) -> str:
  """Returns a shape as text."""
  return 'absent' if shape is None else str(list(shape))


def random_key(key: Any) -> jax.Array:
  """Returns a random key, that of a seed if it is a whole number.

  Raises:
    InputError: it is neither.
  """
  if isinstance(key, numbers.Integral) and not isinstance(key, bool):
    return jax.random.key(int(key))
  dtype, shape = getattr(key, 'dtype', None), getattr(key, 'shape', None)
  if dtype is not None and jnp.issubdtype(dtype, jnp.integer) and shape == ():
    return jax.random.key(key)
  # Keys of the old kind are two words of 32 bits.
  old = dtype == jnp.uint32 and shape == (2,)
  new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not old and not (new and shape == ()):
    raise InputError(
      f'key: is {told(key)}; give a seed, or one key: jax.random.key(0)'
    )
  return key


def sizes(**given: Any) -> None:
  """Raises InputError unless each value is a whole number above 0."""
  for name, value in given.items():
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < 1:
      raise InputError(
        f'{name} = {told(value)}: must be a whole number above 0'
      )


def _check_arrays(given: Given) -> None:
  """Raises InputError for wrong dtypes or shapes."""
  tokens = given.tokens
  whole = lambda a: jnp.issubdtype(a.dtype, jnp.integer)
  if getattr(tokens, 'ndim', 0) != 2 or not whole(tokens):
    hint = ', as jnp.array([[1, 2, 3]])'
    if hasattr(tokens, 'ndim'):
      hint = '; tokens[None] is one row' if tokens.ndim == 1 else ''
    raise InputError(f'tokens: {_shape(tokens)}; must be integers [B T]{hint}')
  if 0 in tokens.shape:
    raise InputError(
      f'tokens: {_shape(tokens)} hold none; give at least one row of one token'
    )
  for name in ('positions', 'segment_ids'):
    array = getattr(given, name)
    if array is None:
      continue
    if getattr(array, 'shape', None) != tokens.shape or not whole(array):
      raise InputError(
        f'{name}: {_shape(array)}; must be integers like tokens,'
        f' {list(tokens.shape)}'
      )


def _shape(array: Any) -> str:
  """Returns dtype and shape of an array as text, or that it is none."""
  if hasattr(array, 'dtype') and hasattr(array, 'shape'):
    return f'{array.dtype}{list(array.shape)}'
  return f'{type(array).__name__}, no array'


def _check_routes(config: Any, given: Given) -> None:
  """Raises InputError for experts that a router could not have chosen."""
  if given.routes is None:
    return
  layers = [
    layer.block.ffn
    for layer in config.in_order()
    if hasattr(layer.block.ffn, 'experts')
  ]
  sizes = {ffn.top_k for ffn in layers}
  wanted = (*given.tokens.shape, len(layers), max(sizes, default=0))
  whole = jnp.issubdtype(getattr(given.routes, 'dtype', float), jnp.integer)
  if getattr(given.routes, 'shape', None) != wanted or not whole:
    raise InputError(
      f'routes: {_shape(given.routes)}; must be integers {list(wanted)}, the'
      ' experts of each token in each layer that has some'
    )
  if len(sizes) > 1:
    raise InputError(
      f'routes: layers take {sorted(sizes)} experts; only a model whose layers'
      ' take equally many can replay them'
    )
  routes = known(given.routes)
  if routes is None:
    return
  experts = min(ffn.experts for ffn in layers)
  _check_range('routes', np.maximum(routes, 0), experts, 'experts', None)
  ordered = np.sort(routes, axis=-1)
  twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
  if twice.any():
    raise InputError(
      f'routes: token {list(map(int, np.argwhere(twice)[0][:2]))} [row, token]'
      ' has an expert twice'
    )


def _check_before(config: Any, given: Given, cache: Cache | None) -> None:
  """Raises InputError for a look-back that can't be, or one that is missing."""
  engrams = bool(config.engram_layers())
  array = given.before
  if array is None:
    if engrams and cache is not None and cache.recent is None:
      raise InputError(
        'before = None: the cache keeps no last tokens (recent = None), so'
        ' give those before the first, [B N-1]'
      )
    return
  if cache is None or not engrams:
    why = 'no memory reads them' if not engrams else 'there is no cache'
    raise InputError(f'before: {why}; leave it out')
  shape = *given.tokens.shape[:1], config.engram.longest - 1
  whole = jnp.issubdtype(getattr(array, 'dtype', float), jnp.integer)
  if getattr(array, 'shape', None) != shape or not whole:
    raise InputError(
      f'before: {_shape(array)}; must be the last integers before tokens,'
      f' {list(shape)}'
    )


def _check_positions(given: Given, cache: Cache) -> bool:
  """Returns whether positions of real tokens are known and lie in the cache.

  Raises:
    InputError: known ones that do not.
  """
  at, real = given.positions, given.segment_ids
  at = None if at is None else known(at)
  if at is None or (real is not None and known(real) is None):
    return False
  at = at if real is None else at[known(real) > 0]
  for wrong in at[(at < 0) | (at >= cache.slots)][:1]:
    raise InputError(
      f'positions: {wrong} is outside the cache of {cache.slots} slots; make'
      ' it longer with init_cache(batch, slots)'
    )
  return True


def _check_slots(given: Given, cache: Cache) -> None:
  """Raises InputError for tokens that the cache has no slot for."""
  if _check_positions(given, cache):
    return
  length = known(cache.length)
  # Inside jit the length is unknown: then the new tokens alone must fit.
  held = int(length.max(initial=0)) if length is not None else 0
  new = given.tokens.shape[1]
  if held + new > cache.slots:
    raise InputError(
      f'{new} tokens after {held} do not fit a cache of {cache.slots} slots;'
      ' make it longer with init_cache(batch, slots)'
    )


def _check_segments(segments: np.ndarray) -> None:
  """Raises InputError for a segment id below 0.

  The -1 of another library may number a document, or padding.
  """
  if segments.size and segments.min() < 0:
    place = tuple(int(i) for i in np.argwhere(segments < 0)[0])
    raise InputError(
      f'segment_ids: {segments[place]} at [row, token] {list(place)} is below'
      ' 0; number documents from 1 and mark padding with 0'
    )


def _check_one_document(
  segments: np.ndarray, positions: Any, fresh: bool
) -> None:
  """Raises InputError for a row of several documents in a call with a cache.

  Also for a row that begins with padding, in a later call without positions.

  Args:
    segments: [B T] of the host.
    positions: as given, or None.
    fresh: whether nothing is cached yet.
  """
  real = segments > 0
  changes = real[:, 1:] & (segments[:, 1:] != segments[:, :-1])
  documents = changes.sum(axis=1) + real[:, :1].sum(axis=1)
  for row in np.flatnonzero(documents > 1)[:1]:
    raise InputError(
      f'segment_ids: row {row} holds {documents[row]} documents; with a cache'
      ' a row is one document: give each a row of its own'
    )
  late = ~real[:, :1].any(axis=1) & real.any(axis=1)
  for row in np.flatnonzero(late)[:1]:
    if not fresh and positions is None:
      raise InputError(
        f'segment_ids: row {row} begins with padding; after the first call with'
        ' a cache padding comes after the tokens'
      )


def _check_range(
  name: str, array: Any, size: int, what: str, real: np.ndarray | None
) -> None:
  """Raises InputError for the first number outside 0..size - 1.

  Args:
    name: of the array, for the message.
    array: [B T ...]; unknown values are not checked.
    size: how many numbers are valid.
    what: what they number, for the message.
    real: [B T] bool, the tokens to check; None: all.
  """
  array = known(array)
  if array is None:
    return
  outside = (array < 0) | (array >= size)
  if real is not None:
    outside &= real.reshape(*real.shape, *(1,) * (array.ndim - 2))
  if outside.any():
    place = tuple(int(i) for i in np.argwhere(outside)[0][:2])
    raise InputError(
      f'{name}: {array[outside][0]} at [row, token] {list(place)} is outside'
      f' the {what} of {size}; mark padding with segment id 0'
    )
