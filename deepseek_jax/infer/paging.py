"""Keeps the caches of many requests in pages, and shows them to the model.

A layer's cache [B S ...] has one row for every `ratio` tokens. In the store the
rows of P tokens are a page, pages of all requests lie in one pool, and a
request's table names its pages in order. What a layer keeps of the last tokens
alone (rings) has no pages: each decoding slot has it once. `view` gathers the
pages of some requests to a plain `Cache`, on which the training model runs;
`commit` puts the pages back that its new tokens have touched. With drafts the
caches of multi-token prediction lie beside it, and the states that it goes on
from.
Legend: R rows, T new tokens, P tokens of a page, n pages of a view, M pages of
the store, L slots of the store.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from deepseek_jax.infer import paged_latents
from deepseek_jax.model.cache import Cache

# Tokens at which the rows of a cache are counted: more than any layer keeps,
# and a multiple of all block sizes with prime factors up to 13.
_PROBE = math.lcm(*range(1, 17)) << 6


class Store(NamedTuple):
  """Holds what is cached of all requests."""

  pages: tuple[jax.Array, ...]  # each [repeat, M, P / ratio, ...]
  slots: tuple[jax.Array, ...]  # each [repeat, L, ...]


class Caches(NamedTuple):
  """Holds what is cached of some requests, as the model wants it.

  Without drafts the cache alone.
  """

  cache: Cache
  mtp: Cache | None = None
  # [R 1+k D] or [R 1+k n D], states of the last tokens that no block of
  # multi-token prediction has seen: the token after each came later
  state: jax.Array | None = None
  ready: jax.Array | None = None  # [R] int32, how many of them, the first ones


class Rows(NamedTuple):
  """Says where rows of a batch are cached."""

  slots: jax.Array  # [R] int32
  table: jax.Array  # [R n] int32, pages in order; 0 where there is none
  start: jax.Array  # [R] int32, tokens cached so far
  count: jax.Array  # [R] int32, tokens that are added; 0: not a request


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Describes one array of a model's cache.

  Attributes:
    ratio: tokens of a row; 0: not one row for so many tokens but a ring.
    shift: row number e is complete after (e + shift + 1) * ratio tokens, so it
      lies in the page of its last token.
    row: bytes of a row, of all layers that the array holds.
  """

  ratio: int
  shift: int
  row: int


@dataclasses.dataclass(frozen=True)
class Paging:
  """Describes how a model's cache lies in pages; see `paging`.

  Attributes:
    page: P.
    leaves: one for each array that is held, in order.
    structure: of the arrays.
    make: (batch, slots) -> what is held of no token.
    drafts: k; by so many tokens a row may be rewound.
  """

  page: int
  leaves: tuple[Leaf, ...]
  structure: Any
  make: Callable[[int, int], Caches]
  drafts: int = 0

  @property
  def ahead(self) -> int:
    """Returns on how many tokens after it what is cached of one rests.

    Multi-token prediction caches a token with the one after it.
    """
    return 1 if self.drafts else 0

  @property
  def has_rings(self) -> bool:
    """Returns whether something is cached by slot, not by page."""
    return any(not leaf.ratio for leaf in self.leaves)

  @property
  def token_bytes(self) -> float:
    """Returns the bytes that each token adds to the cache."""
    return sum(leaf.row / leaf.ratio for leaf in self.leaves if leaf.ratio)

  @property
  def page_bytes(self) -> int:
    """Returns the bytes of a page in all layers."""
    return round(self.token_bytes * self.page)

  @property
  def slot_bytes(self) -> int:
    """Returns the bytes of one slot's rings."""
    return sum(leaf.row for leaf in self.leaves if not leaf.ratio)

  def empty(self, pages: int, slots: int) -> Store:
    """Returns a store of so many pages and slots, all zeros."""
    shapes = _leaves(jax.eval_shape(lambda: self.make(1, self.page)))[0]
    paged, ringed = [], []
    for leaf, like in zip(self.leaves, shapes):
      repeat, _, rows, *rest = like.shape
      if leaf.ratio:
        shape = repeat, pages, self.page // leaf.ratio, *rest
        paged.append(jnp.zeros(shape, like.dtype))
      else:
        shape = repeat, slots, rows, *rest
        ringed.append(jnp.zeros(shape, like.dtype))
    return Store(tuple(paged), tuple(ringed))

  def view(
    self, store: Store, rows: Rows, in_pages: paged_latents.Kinds = ()
  ) -> Caches:
    """Returns what is held of the rows, in caches of [R, n P] slots.

    What lies behind a row's `start` is zero, whatever the pages hold.

    Args:
      store: what is cached.
      rows: of the batch.
      in_pages: kinds of caches whose latents stay where they are, see
        `paged_latents.in_pages`.
    """
    paged, ringed, out = iter(store.pages), iter(store.slots), []
    stay = paged_latents.leaves(self.structure, len(self.leaves), in_pages)
    for i, leaf in enumerate(self.leaves):
      if not leaf.ratio:
        out.append(_taken(next(ringed), rows))
        continue
      pool = next(paged)
      out.append(pool if i in stay else _gathered(pool, leaf, rows))
    layers, recent, mtp, state, ready = jax.tree.unflatten(self.structure, out)
    if in_pages:
      layers, mtp = paged_latents.in_pages((layers, mtp), rows.table, in_pages)
    slots = rows.table.shape[1] * self.page
    one = lambda a: None if a is None else a[0]
    cache = lambda layers, recent: Cache(
      layers, rows.start, slots, False, recent
    )
    return Caches(
      cache(layers, one(recent)),
      None if mtp is None else cache(mtp, None),
      one(state),
      None if ready is None else ready[0, :, 0],
    )

  def commit(self, store: Store, held: Caches, rows: Rows, most: int) -> Store:
    """Returns the store with the pages that new tokens have touched.

    Args:
      store: before them.
      held: the view, after the model has run on it.
      rows: as for `view`; `count` tokens were added to each.
      most: no row has had more tokens added.
    """
    held, stayed = paged_latents.plain(held)
    leaves, _ = _leaves(held)
    stay = paged_latents.leaves(self.structure, len(self.leaves), stayed)
    # Multi-token prediction begins with the states that waited.
    before = self.drafts + 1 if self.drafts else 0
    touched = _touched(rows, self.page, most, before, store)
    paged, ringed = iter(store.pages), iter(store.slots)
    pages, slots = [], []
    for i, (leaf, new) in enumerate(zip(self.leaves, leaves)):
      if i in stay:
        next(paged)
        pages.append(new)
      elif leaf.ratio:
        n = rows.table.shape[1]
        pages.append(_put(next(paged), leaf, new, n, *touched))
      else:
        pool = next(ringed)
        # One beyond the last slot, where mode='drop' writes nothing.
        at = jnp.where(rows.count > 0, rows.slots, pool.shape[1])
        slots.append(pool.at[:, at].set(new, mode='drop'))
    return Store(tuple(pages), tuple(slots))


@functools.lru_cache(maxsize=32)
def paging(model: Any, page: int, drafts: int = 0) -> Paging:
  """Returns how the cache of a model lies in pages.

  Args:
    model: with init_cache(batch, slots, spare).
    page: P; it is rounded up until whole rows of every layer fit.
    drafts: k, tokens that multi-token prediction guesses at a time; 0: none.

  Raises:
    InputError: a layer's rows don't grow evenly with the tokens, or a model
      that can't draft.
  """
  make = functools.partial(_empty, model, drafts)
  shapes = lambda slots: _leaves(jax.eval_shape(lambda: make(1, slots)))
  (less, structure), (more, _) = shapes(_PROBE), shapes(2 * _PROBE)
  leaves = list(map(_leaf, less, more))
  # Rows that end in a page start at most one page before.
  needed = [leaf.ratio * (leaf.shift + 1) for leaf in leaves if leaf.ratio]
  step = math.lcm(*(leaf.ratio for leaf in leaves if leaf.ratio), 1)
  page = -(-max(page, *needed, 1) // step) * step
  return Paging(page, tuple(leaves), structure, make, drafts)


def _empty(model: Any, drafts: int, batch: int, slots: int) -> Caches:
  """Returns what is held of no token."""
  if not drafts:
    return Caches(model.init_cache(batch, slots))
  cfg = model.config
  streams = (cfg.residual.streams,) if cfg.mtp.streams else ()
  shape = batch, 1 + drafts, *streams, cfg.dim
  return Caches(
    model.init_cache(batch, slots, drafts),
    model.init_mtp_cache(batch, slots, drafts),
    jnp.zeros(shape, cfg.compute.products),
    jnp.zeros(batch, jnp.int32),
  )


def _leaf(less: Any, more: Any) -> Leaf:
  """Returns what an array is, of its shapes at one and two _PROBE tokens."""
  grown = more.shape[2] - less.shape[2]
  if grown and (_PROBE % grown or less.shape[3:] != more.shape[3:]):
    raise InputError(
      f'cache: an array of {list(less.shape)} for {_PROBE} tokens is'
      f' {list(more.shape)} for {2 * _PROBE}; pages hold a row of R tokens,'
      ' where R (a compression ratio, a stride, a size of blocks) has no prime'
      ' factor above 13'
    )
  ratio = _PROBE // grown if grown else 0
  shift = _PROBE // ratio - less.shape[2] if ratio else 0
  numbers = math.prod(less.shape) // (less.shape[2] if ratio else 1)
  return Leaf(ratio, shift, numbers * less.dtype.itemsize)


def _leaves(held: Caches) -> tuple[list, Any]:
  """Returns the arrays that are held, each [repeat B rows ...], their tree."""
  cache, mtp, state, ready = held
  # Those of no layer stand for one.
  one = lambda a: a if a is None else _reshaped(a, (1, *a.shape))
  if ready is not None:
    ready = _reshaped(ready, (1, *ready.shape, 1))
  mtp = mtp and mtp.layers
  return jax.tree.flatten(
    (cache.layers, one(cache.recent), mtp, one(state), ready)
  )


def _reshaped(array: Any, shape: tuple[int, ...]) -> Any:
  """Returns an array, or what only says its shape, in another shape."""
  if isinstance(array, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, array.dtype)
  return array.reshape(shape)


def _gathered(pool: jax.Array, leaf: Leaf, rows: Rows) -> jax.Array:
  """Returns the pages of the rows as [repeat R S ...], zero behind `start`."""
  pages = pool[:, rows.table]  # [repeat R n P/ratio ...]
  flat = pages.reshape(*pages.shape[:2], -1, *pages.shape[4:])
  flat = flat[:, :, leaf.shift :]
  there = rows.start // leaf.ratio - leaf.shift  # complete rows
  seen = jnp.arange(flat.shape[2]) < there[:, None]
  seen = seen.reshape(1, *seen.shape, *(1,) * (flat.ndim - 3))
  return jnp.where(seen, flat, 0)


def _taken(pool: jax.Array, rows: Rows) -> jax.Array:
  """Returns the rings of the rows; zeros where nothing is cached yet."""
  rings = pool[:, rows.slots]
  begun = (rows.start > 0).reshape(1, -1, *(1,) * (rings.ndim - 2))
  return jnp.where(begun, rings, 0)


def _touched(
  rows: Rows, page: int, most: int, before: int, store: Store
) -> tuple[jax.Array, jax.Array]:
  """Returns which pages of each row new tokens touch, and where they lie.

  Args:
    rows: see `Paging.commit`.
    page: P.
    most: see there.
    before: rows of so many tokens before the new ones may have changed, too.
    store: to which pages are put back.

  Returns:
    [R m] places in the table, and as many pages of the store; beyond the last
    page where nothing is written.
  """
  n = rows.table.shape[1]
  # A page more than the tokens fill, as they may begin inside of one.
  m = min(n, -(-(most + before) // page) + 1)
  first = jnp.maximum(rows.start - before, 0) // page
  place = first[:, None] + jnp.arange(m)
  written = place * page < (rows.start + rows.count)[:, None]
  written &= (rows.count > 0)[:, None] & (place < n)
  place = jnp.minimum(place, n - 1)
  at = jnp.take_along_axis(rows.table, place, axis=1)
  beyond = store.pages[0].shape[1] if store.pages else 0
  return place, jnp.where(written, at, beyond)


def _put(
  pool: jax.Array,
  leaf: Leaf,
  new: jax.Array,
  n: int,
  place: jax.Array,
  at: jax.Array,
) -> jax.Array:
  """Returns the pool with pages `place` [R m] of new [repeat R S ...] at `at`.

  Pages beyond the pool are not written.
  """
  rest = [(0, 0)] * (new.ndim - 3)
  whole = jnp.pad(new, [(0, 0), (0, 0), (leaf.shift, 0), *rest])
  pages = whole.reshape(*whole.shape[:2], n, -1, *whole.shape[3:])
  rows = jnp.arange(place.shape[0])[:, None]
  return pool.at[:, at].set(pages[:, rows, place], mode='drop')


@functools.partial(jax.jit, donate_argnums=0)
def copied(store: Store, source: int, to: int) -> Store:
  """Returns the store with the rings of one slot in another, too."""
  copy = lambda a: a.at[:, to].set(a[:, source])
  return store._replace(slots=tuple(map(copy, store.slots)))


def beside(store: Store, variables: dict) -> Store:
  """Returns the store committed to the device that the variables are on.

  What a program gives back is, if any of its arguments was: the first shape
  would be compiled again for a store that came uncommitted. On several devices
  the mesh decides.
  """
  places = {d for a in jax.tree.leaves(variables) for d in a.devices()}
  if len(places) == 1 and any(a.committed for a in jax.tree.leaves(variables)):
    return jax.device_put(store, places.pop())
  return store
