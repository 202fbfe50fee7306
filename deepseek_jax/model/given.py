"""Checks of what a caller gives to a model, as far as the values are known.

Inside jit they are not: there shapes and dtypes alone are checked, and what is
wrong becomes NaN logits (see `context.context` and `lookup.rows`).
Legend: B batch, T tokens, L layers with a memory, K rows of a token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.model.cache import Cache
from deepseek_jax.parallel.sharding import known


class Given(NamedTuple):
  """Arrays of a call; see `transformer.build`."""

  tokens: Any  # [B T]
  positions: Any = None  # [B T] or None
  segment_ids: Any = None  # [B T] or None
  ngrams: Any = None  # [B T L K] or None


def check(config, given: Given, cache: Cache | None) -> None:
  """Raises InputError for arrays that the model of `config` can't read."""
  _check_arrays(given)
  if cache is not None:
    _check_slots(given, cache)
  segments = None
  if given.segment_ids is not None:
    segments = known(given.segment_ids)
    if segments is None:
      return
    if cache is not None:
      _check_one_document(segments, given.positions, cache.fresh)
  real = None if segments is None else segments > 0
  _check_range('tokens', given.tokens, config.vocab_size, 'vocabulary', real)
  if given.ngrams is not None and config.engram is not None:
    rows = config.engram.rows(len(config.engram_layers()))
    _check_range('ngrams', given.ngrams, rows, "memories' tables", real)


def _check_arrays(given: Given) -> None:
  tokens = given.tokens
  whole = lambda a: jnp.issubdtype(a.dtype, jnp.integer)
  if getattr(tokens, 'ndim', 0) != 2 or not whole(tokens):
    raise InputError(f'tokens: {_shape(tokens)}; must be integers [B T]')
  for name in ('positions', 'segment_ids'):
    array = getattr(given, name)
    if array is None:
      continue
    if getattr(array, 'shape', None) != tokens.shape or not whole(array):
      raise InputError(
        f'{name}: {_shape(array)}; must be integers like tokens,'
        f' {list(tokens.shape)}'
      )


def _shape(array) -> str:
  if hasattr(array, 'dtype') and hasattr(array, 'shape'):
    return f'{array.dtype}{list(array.shape)}'
  return f'{type(array).__name__}, no array'


def _check_slots(given: Given, cache: Cache) -> None:
  length = known(cache.length)
  held = int(length.max(initial=0)) if length is not None else 0
  new = given.tokens.shape[1]
  if held + new > cache.slots:
    raise InputError(
      f'{new} tokens after {held} do not fit a cache of {cache.slots} slots;'
      ' make it longer with init_cache(batch, slots)'
    )


def _check_one_document(segments, positions, fresh: bool) -> None:
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


def _check_range(name: str, array, size: int, what: str, real) -> None:
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
