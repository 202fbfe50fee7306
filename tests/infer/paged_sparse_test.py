"""V3.2 reads what it chose in the engine's pages, and answers as in rows."""

import dataclasses
import functools
import logging
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.infer import paged_latents
from deepseek_jax.infer.paging import paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.model import kernels
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.latent_reading import Latent
from deepseek_jax.model.attention.paged_latent import PagedLatent
from deepseek_jax.model.attention.sparse_latent import (
  PagedSparseLatent,
  SparseLatent,
)
from deepseek_jax.model.context import Context
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.parallel import sharding
from pallas_kernels import dispatch
from tests import tiny
from tests.infer import families
from tests.infer.paged_latents_test import (
  LATENT,
  answers,
  program,
  shared,
  whole_rows,
)

SPARSE = DSAConfig(
  *(getattr(LATENT, f.name) for f in dataclasses.fields(LATENT)),
  indexer=IndexerConfig(16, 128),
  top_k=128,
)
BLOCKS = dataclasses.replace(
  SPARSE, indexer=IndexerConfig(16, 128, blocks=IndexBlocksConfig(32, 4))
)


class AnswersTest(parameterized.TestCase):
  def check(self, name, drafts=0, attention=(), op='sparse_mla', **how):
    config = families.config(name)
    config = ds.changed(config, {f'attention.{k}': v for k, v in attention})
    if drafts:
      config = dataclasses.replace(config, mtp=MTPConfig(1, 'dense'))
    variables = tiny.draw(ds.build(config))
    own, _, _ = answers(config, variables, None, drafts, **how)
    pages, seen, run = answers(config, variables, 'reference', drafts, **how)
    for a, b in zip(own, pages, strict=True):
      families.check_same(a, b)
      self.assertEqual(a.usage, b.usage)
    # The store's pool, as pages or as one row; it is never rows of requests.
    M, C = run._store.pages[0].shape[1], config.attention.kv_rank
    pool = {
      'sparse_mla': f'float32[1,{8 * M},{C}]',
      'mla_decode': f'float32[{M},8,{C}]',
    }[op]
    self.assertTrue(any(o == op and pool in shapes for o, shapes in seen), seen)
    for held in run._store.pages:
      self.assertEqual(float(abs(held[:, 0]).max()), 0)
    spoiled, _, _ = answers(
      config, variables, 'reference', drafts, spoil=True, **how
    )
    self.assertEqual(spoiled, pages)
    return run

  def test_pages_answer_as_gathered_rows_do(self):
    self.check('dsa')

  @pytest.mark.slow
  def test_so_they_do_with_blocks_first(self):
    self.check('in_blocks')

  @parameterized.parameters(('dsa', 1), ('in_blocks', 3))
  @pytest.mark.slow
  def test_so_they_do_with_drafts(self, name, drafts):
    self.check(name, drafts)

  @parameterized.parameters(
    ((('stage', 'dense'),),),
    # As many as a row has places.
    ((('top_k', 64),),),
  )
  @pytest.mark.slow
  def test_dense_layers_read_the_pages_whole(self, attention):
    self.check('dsa', attention=attention, op='mla_decode')

  @parameterized.parameters(0, 2)
  @pytest.mark.slow
  def test_shared_beginnings_and_preempted_answers_do(self, drafts):
    run = self.check('in_blocks', drafts, given=shared(), pages=14)
    self.assertGreater(run.stats['preempted'], 0)
    self.assertGreater(run.stats['cached_tokens'], 0)
    self.assertGreaterEqual(run.stats['accepted_drafts'], drafts)


class LayerTest(parameterized.TestCase):
  """Two rows whose pages lie anywhere, beside a cache of rows."""

  @parameterized.parameters(None, 'reference')
  def test_choices_are_read_from_a_rows_own_pages(self, impl):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 12, 16)), jnp.float32)
    cfg = families.config('dsa').attention
    module = cfg.build(16, std=1.0, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    weights = tiny.fill(nnx.to_pure_dict(state))

    @functools.partial(jax.jit, static_argnums=0)
    def layer(fresh, x, tokens, at, segments, past):
      ctx = Context(tokens, at, segments, fresh=fresh)
      return nnx.merge(graphdef, weights)(x, ctx, past)

    at = jnp.broadcast_to(jnp.arange(12), (2, 12))
    none = jnp.zeros((2, 12), jnp.int32)
    _, rows, _ = layer(True, x, none, at, None, cfg.cache(2, 16, x.dtype))
    # Row 0 in pages 5, 2, 1; row 1 in 3, 6, 4, its last place in none.
    table = jnp.asarray([[5, 2, 1, -1], [3, 6, 4, -1]])
    pool = lambda a: (
      jnp.zeros((7, 4, a.shape[-1]), a.dtype)
      .at[table[:, :3]]
      .set(a[:, :12].reshape(2, 3, 4, -1))
    )
    latents = PagedLatent(Latent(pool(rows.c), pool(rows.kr)), table)
    pages = PagedSparseLatent(latents, rows.index)
    x = jnp.asarray(rng.normal(size=(2, 2, 16)), jnp.float32)
    # Both rows are rewound; the second token of row 1 is padding.
    at = jnp.asarray([[9, 10], [10, 11]])
    new = x, none[:, :2], at, jnp.asarray([[1, 1], [1, 0]])
    with kernels.using(impl):
      want, rows, _ = layer(False, *new, rows)
      got, pages, _ = layer(False, *new, pages)
    self.assertLess(tiny.relative(got[0], want[0]), 1e-5)
    self.assertLess(tiny.relative(got[1, 0], want[1, 0]), 1e-5)
    # Padding reads nothing at all.
    np.testing.assert_array_equal(got[1, 1], 0)
    held = pages.latents.gathered(jnp.asarray([12, 12]))
    for a, b in zip(held, rows[:2]):
      np.testing.assert_array_equal(a[:, :12], b[:, :12])

  def test_all_pages_are_one_row(self):
    pages = Latent(jnp.zeros((3, 4, 2)), jnp.zeros((3, 4, 1)))
    past = PagedSparseLatent(
      PagedLatent(pages, jnp.asarray([[2, 0], [1, -1]])), jnp.zeros((2, 8, 3))
    )
    chosen = jnp.asarray([[[0, 5, -1], [3, 4, 7]], [[2, 3, 4], [0, -1, -1]]])
    keys, at = past.one_row(chosen, None)
    want = [[8, 1, -1], [11, 0, 3], [6, 7, -1], [4, -1, -1]]
    np.testing.assert_array_equal(at[0], want)
    self.assertEqual([a.shape for a in keys], [(1, 12, 2), (1, 12, 1)])
    _, at = past.one_row(chosen, jnp.asarray([[True, False], [False, True]]))
    want[1] = want[2] = [-1] * 3
    np.testing.assert_array_equal(at[0], want)


class TracedTest(parameterized.TestCase):
  @parameterized.parameters((SPARSE, 0), (SPARSE, 1), (BLOCKS, 3))
  def test_on_hopper_no_row_is_gathered(self, latent, drafts):
    # Three pages of 64 in a row, and 13 pages of all four.
    made, choices = program(drafts, latent=latent)
    W, found = 1 + drafts, {c.shapes for c in choices if c.op == 'sparse_mla'}
    # A step of the model and of the block that drafts, then one draft alone.
    widths = {1, W} if drafts > 1 else {W}
    self.assertLen(found, len(widths))
    for shapes, W in zip(sorted(found, key=len), sorted(widths)):
      self.assertStartsWith(shapes, f'bfloat16[1,{4 * W},2,512]')
      self.assertIn('bfloat16[1,832,512]', shapes)
      self.assertEndsWith(shapes, f'bfloat16[1,832,64] int32[1,{4 * W},128]')
    self.assertEqual({c.impl for c in choices}, {'gpu'})
    self.assertEmpty(whole_rows(made, 4, 192, 512))

  @parameterized.parameters(
    ({'device': ('tpu',)}, 'there is no kernel for TPUs'),
    ({'dtype': 'float32'}, 'dtype float32/float32, not bfloat16'),
    (
      {'latent': dataclasses.replace(SPARSE, kv_rank=384)},
      'latent 384 and rope 64',
    ),
    # Short rows are read by the kernel of MLA.
    ({'page': 96}, '96 tokens a page, not 64'),
  )
  def test_what_is_gathered_says_why(self, how, reason):
    with self.assertLogs('pallas_kernels', logging.WARNING) as logs:
      made, _ = program(0, **{'latent': SPARSE, **how})
    said = [line for line in logs.output if 'gathers its pages' in line]
    self.assertLen(said, 1)
    self.assertIn(reason, said[0])
    slots = 3 * how.get('page', 64)
    width = how.get('latent', SPARSE).kv_rank
    self.assertNotEmpty(whole_rows(made, 4, slots, width))

  def test_few_keys_are_read_by_the_kernel_of_mla(self):
    few = dataclasses.replace(SPARSE, top_k=192)
    _, choices = program(1, latent=few)
    [shapes] = {
      c.shapes
      for c in choices
      if c.op == 'mla_decode' and '[13,64,512] bfloat16[13,64,64]' in c.shapes
    }
    self.assertEndsWith(shapes, 'int32[4,3] int32[4]')
    self.assertEqual({c.impl for c in choices}, {'gpu'})


class KindsTest(parameterized.TestCase):
  @parameterized.parameters('mla', 'dsa')
  def test_on_a_mesh_rows_are_gathered(self, name):
    config = families.config(name)
    paged = paging(build_flat(ds.build(config)), 8)
    store = jax.eval_shape(lambda: paged.empty(5, 2))
    compute = dataclasses.replace(config.compute, kernels='reference')
    self.assertLen(paged_latents.wanted(compute, store, paged), 1)
    dispatch.say_once.cache_clear()
    with (
      mock.patch.object(sharding, 'to_shard', lambda: True),
      self.assertLogs('pallas_kernels', logging.WARNING) as logs,
    ):
      self.assertEmpty(paged_latents.wanted(compute, store, paged))
    self.assertIn('a mesh of several devices', logs.output[0])

  def test_each_kind_of_layer_stays_where_its_kernel_reads(self):
    array = lambda i: jnp.full((1, 3, 4, 2), i)
    layers = [
      Latent(array(0), array(1)),
      SparseLatent(array(2), array(3), array(4), array(5)),
      SparseLatent(array(6), array(7), array(8)),
    ]
    # The model's own, its last tokens, and multi-token prediction.
    mtp = [Latent(array(10), array(11))]
    structure = jax.tree.structure((layers, array(9), mtp))
    find = lambda *kinds: paged_latents.leaves(structure, 12, kinds)
    self.assertEqual(find(Latent), {0, 1, 10, 11})
    self.assertEqual(find(SparseLatent), {2, 3, 6, 7})
    self.assertEqual(find(Latent, SparseLatent), {0, 1, 2, 3, 6, 7, 10, 11})
    self.assertEmpty(find())
    table = jnp.asarray([[1, 0]])
    paged = paged_latents.in_pages(layers, table, (SparseLatent,))
    self.assertIs(type(paged[0]), Latent)
    np.testing.assert_array_equal(paged[1].latents.table, [[[1, -1]]])
    back, kinds = paged_latents.plain(paged)
    self.assertEqual(kinds, (SparseLatent,))
    self.assertEqual(jax.tree.structure(back), jax.tree.structure(layers))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(layers)):
      self.assertIs(a, b)


if __name__ == '__main__':
  absltest.main()
