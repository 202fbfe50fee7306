"""Keys that are looked for in blocks: choices, caches, cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention import dsa, index_blocks
from deepseek_jax.model.attention import indexer as index
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
  IndexQuery,
)
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.model.context import Context
from tests import sparse_reference, tiny

HEADS, DIM, T = 3, 6, 61
SIZES = IndexBlocksConfig(4, 3)


def drawn(length=T, rows=2, seed=0):
  """Queries and keys of any numbers."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  query = IndexQuery(draw(rows, length, HEADS, DIM), draw(rows, length, HEADS))
  return query, draw(rows, length, DIM)


def segments(*lengths):
  """[B T] of documents of such lengths, 0 behind them."""
  out = np.zeros((len(lengths), T), np.int32)
  for row, sizes in zip(out, lengths):
    row[: sum(sizes)] = np.repeat(np.arange(len(sizes)) + 1, sizes)
  return jnp.asarray(out)


PACKED = segments((1, 3, 30, 27), (61,))


@functools.partial(jax.jit, static_argnames=('cfg', 'k', 'most'))
def chosen(query, keys, documents=None, *, cfg=SIZES, k=5, most=8):
  at = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape[:2])
  return index_blocks.choose(
    cfg,
    query,
    keys,
    index_blocks.fresh(cfg, keys, documents),
    Visibility(at, documents),
    k,
    key_segments=documents,
    most=most,
  )


@functools.partial(jax.jit, static_argnames=('cfg', 'k'))
def by_kernel(query, keys, documents=None, *, cfg=SIZES, k=5):
  """Compares the kernels' references with the layer's own code."""
  at = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape[:2])
  blocks = index_blocks.fresh(cfg, keys, documents)
  return index_blocks.choose_by_kernel(
    'reference', query, keys, blocks, at, documents, cfg=cfg, top_k=k
  )


def by_hand(query, keys, documents, cfg, k):
  """Choices of one query at a time, in float64."""
  q, w, keys = (np.float64(a) for a in (*query[:2], keys))
  out = np.full((*keys.shape[:2], k), -1)
  for b in range(len(keys)):

    def of(t, some, b=b):
      dots = np.maximum(0, q[b, t] @ np.asarray(some).reshape(-1, DIM).T)
      return w[b, t] @ dots

    for t in range(keys.shape[1]):
      seen = sparse_reference.visible(t, documents[b])
      near = sparse_reference.in_blocks(cfg, t, seen, keys[b], of)
      scores = dict(zip(near, of(t, keys[b, near])))
      best = sorted(sparse_reference.ranked(scores, near)[:k])
      out[b, t, : len(best)] = best
  return out


class ChoiceTest(parameterized.TestCase):
  @parameterized.parameters((4, 3, 5), (4, 2, 8), (1, 9, 4), (8, 4, 20))
  def test_equals_brute_force_in_packed_documents(self, size, count, k):
    cfg = IndexBlocksConfig(size, count)
    query, keys = drawn()
    got = chosen(query, keys, PACKED, cfg=cfg, k=k)
    want = by_hand(query, keys, np.asarray(PACKED), cfg, k)
    np.testing.assert_array_equal(got, want)
    got = by_kernel(query, keys, PACKED, cfg=cfg, k=k)
    np.testing.assert_array_equal(got, want)

  def test_is_no_longer_the_best_of_all(self):
    """Or these tests would compare two flat searches."""
    query, keys = drawn()
    seen = PACKED[:, :, None] == PACKED[:, None]
    seen &= jnp.tril(jnp.ones((T, T), bool))
    flat = index.best(index.index_scores(query, keys), seen, 5)
    got = chosen(query, keys, PACKED)
    short = np.asarray(jnp.arange(T) < 12)[None] & (PACKED == 1)
    np.testing.assert_array_equal(got[short], flat[short])
    differs = (np.asarray(got) != np.asarray(flat)).any(-1)
    self.assertGreater(differs[1].mean(), 0.5)

  def test_is_the_flat_choice_where_all_keys_lie_in_so_few_blocks(self):
    query, keys = drawn(12, seed=1)
    at = jnp.broadcast_to(jnp.arange(12), (2, 12))
    flat = index.choose(query, keys, Visibility(at), 5)
    np.testing.assert_array_equal(chosen(query, keys), flat)

  def test_a_packed_document_chooses_as_it_does_alone(self):
    query, keys = drawn()
    packed = chosen(query, keys, PACKED)
    cut = lambda a: a[:1, 4:34]
    alone = chosen(jax.tree.map(cut, query), cut(keys))
    np.testing.assert_array_equal(
      cut(packed)[0], np.where(alone[0] >= 0, alone[0] + 4, -1)
    )

  def test_of_equal_scores_the_lowest_places_are_taken(self):
    query, keys = drawn()
    query = query._replace(weight=query.weight * 0)
    for choose in (chosen, by_kernel):
      got = choose(query, keys)[0, -1]
      np.testing.assert_array_equal(got, [0, 1, 2, 3, 4])

  def test_kernels_choose_the_same_of_a_cache_with_room(self):
    """Later blocks have means of anything, and padding any place."""
    query, keys = drawn()
    longer = lambda a, fill: jnp.pad(
      a, ((0, 0), (0, 80 - T), (0, 0)), constant_values=fill
    )
    held = longer(keys, 9.0)
    means = index_blocks.fresh(SIZES, keys, None).means
    blocks = index_blocks.cached(
      SIZES, jnp.pad(means, ((0, 0), (0, 5), (0, 0)), constant_values=9.0)
    )
    at = jnp.broadcast_to(jnp.arange(T), (2, T)).at[1, :3].set([-4, 99, 80])
    want = index_blocks.choose(SIZES, query, held, blocks, Visibility(at), 5)
    how = {'cfg': SIZES, 'top_k': 5}
    got = index_blocks.choose_by_kernel(
      'reference', query, held, blocks, at, None, **how
    )
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(got[0], chosen(query, keys)[0])

  def test_queries_at_a_time_change_nothing(self):
    query, keys = drawn()
    want = chosen(query, keys, PACKED)
    for most in (1, 13, 64):
      got = chosen(query, keys, PACKED, most=most)
      np.testing.assert_array_equal(got, want)

  def test_bfloat16_keys_have_means_of_float32_sums(self):
    keys = jnp.full((1, 512, DIM), 1.001953125, jnp.bfloat16)
    made = index_blocks.fresh(IndexBlocksConfig(512, 2), keys, None)
    self.assertEqual(made.means.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(made.means[0, 0], keys[0, 0])


class CacheTest(parameterized.TestCase):
  @parameterized.parameters(1, 3, 9, 16)
  def test_means_are_those_of_the_whole_however_tokens_come(self, chunk):
    """Also where the last tokens of a chunk don't count."""
    _, keys = drawn()
    cfg, slots = SIZES, 64
    want = index_blocks.fresh(cfg, keys, None).means
    held = jnp.zeros((2, slots, DIM))
    means = index_blocks.empty(cfg, held) + 7

    @jax.jit
    def step(held, means, new, at, count):
      positions = at + jnp.arange(new.shape[1])
      valid = jnp.arange(new.shape[1]) < count
      ctx = Context(
        positions[None],
        jnp.broadcast_to(positions, new.shape[:2]),
        jnp.broadcast_to(valid.astype(int), new.shape[:2]),
      )
      put = jnp.where(valid, positions, slots)
      held = held.at[:, put].set(new, mode='drop')
      return held, index_blocks.remember(cfg, means, held, ctx)

    at = 0
    while at < T:
      new = keys[:, at : at + chunk]
      count = min(chunk, T - at)
      new = jnp.pad(new, ((0, 0), (0, chunk - count), (0, 0)))
      # A few guesses first, which are taken back.
      held, means = step(held, means, new - 1, at, chunk)
      held, means = step(held, means, new, at, count)
      at += count
    np.testing.assert_allclose(means[:, : T // 4], want, rtol=1e-6)
    blocks = index_blocks.cached(cfg, means)
    np.testing.assert_array_equal(blocks.start[0], np.arange(0, slots, 4))

  @parameterized.parameters('before', 'behind', 'around')
  def test_padding_may_stand_anywhere(self, where):
    """Pads where a caller's positions say so; those of padding are any."""
    _, keys = drawn(16)
    before = 0 if where == 'behind' else 3
    behind = 0 if where == 'before' else 2
    segments = np.pad(np.ones((2, 16), int), ((0, 0), (before, behind)))
    positions = np.arange(-before, 16 + behind) * segments + 9 * (segments == 0)
    ctx = Context(*map(jnp.asarray, (segments, positions, segments)))
    held = jnp.pad(keys, ((0, 0), (0, 8), (0, 0)))
    empty = index_blocks.empty(SIZES, held)
    means = index_blocks.remember(SIZES, empty, held, ctx)
    want = index_blocks.fresh(SIZES, keys, None).means
    np.testing.assert_allclose(means[:, :4], want, rtol=1e-6)
    np.testing.assert_array_equal(means[:, 4:], 0)

  def test_a_row_without_tokens_completes_nothing(self):
    _, keys = drawn(16)
    none = jnp.zeros((2, 8), int)
    ctx = Context(none, none + 4, none)
    empty = index_blocks.empty(SIZES, keys)
    means = index_blocks.remember(SIZES, empty, keys, ctx)
    np.testing.assert_array_equal(means, 0)

  def test_a_cache_has_a_mean_per_block(self):
    cfg = dataclasses.replace(
      ds.presets.v32().attention,
      indexer=IndexerConfig(blocks=IndexBlocksConfig(128, 64)),
    )
    made = jax.eval_shape(lambda: cfg.cache(2, 1000, jnp.bfloat16))
    self.assertEqual(made.means.shape, (2, 7, 128))
    self.assertEqual(made.means.dtype, jnp.bfloat16)


def products(length, blocks):
  """Multiply-adds of the choice among so many keys."""
  from tests.model.attention.dsa_test import dot_flops

  cfg = dataclasses.replace(
    tiny_dsa(), indexer=IndexerConfig(HEADS, DIM, blocks=blocks), top_k=8
  )
  of = lambda *shape: jax.ShapeDtypeStruct((1, length, *shape), jnp.float32)
  at = jax.ShapeDtypeStruct((1, length), jnp.int32)
  call = lambda q, w, keys, at: dsa.choose(
    cfg, IndexQuery(q, w), keys, Visibility(at)
  )
  made = jax.make_jaxpr(call)(of(HEADS, DIM), of(HEADS), of(DIM), at)
  return dot_flops(made.jaxpr)


def tiny_dsa():
  fields = dataclasses.fields(tiny.MLA)
  return DSAConfig(**{f.name: getattr(tiny.MLA, f.name) for f in fields})


class CostTest(absltest.TestCase):
  def test_products_are_with_means_and_candidates_alone(self):
    length, blocks = 1024, IndexBlocksConfig(16, 4)
    each = HEADS * (DIM + 1)  # a score of every head, and their weighted sum
    want = length * each * (length // 16 + 4 * 16)
    self.assertEqual(products(length, blocks), want)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(('size', 0, 1), ('count', 1, 2))
  def test_sizes_out_of_range_are_refused(self, name, value, least):
    with self.assertRaisesRegex(
      ds.InputError, rf'indexer\.blocks\.{name} = {value}: .* {least}'
    ):
      IndexBlocksConfig(**{name: value})

  @parameterized.parameters(3, 48, 1 << 15)
  def test_pages_must_hold_whole_blocks(self, size):
    with self.assertRaisesRegex(
      ds.InputError, rf'indexer\.blocks\.size = {size}: must be a power of two'
    ):
      IndexBlocksConfig(size, 64)

  def test_blocks_must_hold_what_a_query_reads(self):
    with self.assertRaisesRegex(
      ds.InputError, r'indexer\.blocks\.count = 2: .* top_k = 2048'
    ):
      DSAConfig(
        *(2, 8, 8, 4, 4, 4),
        indexer=IndexerConfig(2, 8, blocks=IndexBlocksConfig(8, 2)),
      )

  def test_is_one_field_of_a_run(self):
    config = ds.changed(
      ds.recipes.v32_tiny(),
      {'model.attention.indexer.blocks': {'size': 16, 'count': 8}},
    )
    want = IndexBlocksConfig(16, 8)
    self.assertEqual(config.model.attention.indexer.blocks, want)
    again = ds.from_dict(type(config), ds.to_dict(config))
    self.assertEqual(again, config)


if __name__ == '__main__':
  absltest.main()
