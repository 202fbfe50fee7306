"""Checks V3.2 with a cache in float8: index keys, and what they choose."""

import dataclasses
import functools
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.infer.paging import paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.model import kernels
from deepseek_jax.model.attention import dsa, index_codes
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.index_codes import FP8Keys
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
  IndexQuery,
)
from deepseek_jax.model.attention.query_blocks import Visibility
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import ComputeConfig
from tests import tiny
from tests.infer.paged_latents_test import answers, program, shared

I, K, T = 16, 8, 40
CFG = DSAConfig(
  *(2, 12, 128, 8, 4, 6),
  rope=tiny.YARN,
  indexer=IndexerConfig(4, I),
  top_k=K,
)
BLOCKS = dataclasses.replace(
  CFG, indexer=IndexerConfig(4, I, blocks=IndexBlocksConfig(4, 3))
)


def by_hand(x):
  """Rounds vectors [... I] number by number: float64 codes and scales."""
  x = np.asarray(x, np.float64)
  at = np.arange(x.shape[-1])
  signs = [[(-1.0) ** (i & j).bit_count() for i in at.tolist()] for j in at]
  turned = np.float32(x @ np.array(signs) / np.sqrt(len(at)))
  largest = np.maximum(abs(turned).max(-1), 1e-4).astype(np.float64)
  scales = 2.0 ** np.ceil(np.log2(largest / 448))
  codes = (turned / scales[..., None]).astype(ml_dtypes.float8_e4m3fn)
  return codes.astype(np.float64), scales


def best(q, k, w, top_k):
  """Chooses for each query [T J I] the best of keys [S I] before it."""
  out = np.full((len(q), top_k), -1)
  for t in range(len(q)):
    scores = (np.maximum(k[: t + 1] @ q[t].T, 0) * w[t]).sum(-1)
    order = np.argsort(-scores, kind='stable')[:top_k]
    out[t, : len(order)] = np.sort(order)
  return out


def draw(seed=0, dim=I, heads=4, tokens=T):
  """Queries, keys and weights; a few channels of both are large."""
  rng = np.random.default_rng(seed)
  large = 1 + 20 * (np.arange(dim) < 2)
  # Keys of any size: without scales each would weigh the same.
  size = 2.0 ** rng.integers(-3, 4, (2, tokens, 1))
  q = rng.normal(size=(2, tokens, heads, dim)) * large
  k = rng.normal(size=(2, tokens, dim)) * large * size
  w = rng.normal(size=(2, tokens, heads))
  return tuple(jnp.asarray(a, jnp.float32) for a in (q, k, w))


class CodesTest(parameterized.TestCase):
  @parameterized.parameters(1, 16, 128)
  def test_they_are_those_computed_by_hand(self, dim):
    q, k, _ = draw(dim=dim)
    for x in (q, k):
      codes, scales = index_codes.encoded(x)
      want, wanted = by_hand(x)
      np.testing.assert_array_equal(scales, wanted)
      # Sums of float32 are in another order: few numbers lie at a border.
      self.assertLess((np.float64(codes) != want).mean(), 1e-3)
      # bfloat16 holds every one of them.
      exact = np.float64(codes) * np.float64(scales)[..., None]
      wide = np.float64(index_codes.decoded(codes, scales))
      np.testing.assert_array_equal(wide, exact)

  @parameterized.parameters(None, 'reference')
  def test_choices_are_those_of_float64(self, impl):
    q, k, w = draw()
    query = IndexQuery(q, w).encoded()
    keys = FP8Keys(*index_codes.encoded(k))
    at = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (2, T))
    with kernels.using(impl):
      got = dsa.choose(CFG, query, keys, Visibility(at))
    for b in range(2):
      (q8, q_scale), (k8, k_scale) = by_hand(q[b]), by_hand(k[b])
      k8, w8 = k8 * k_scale[:, None], np.asarray(w[b]) * q_scale
      np.testing.assert_array_equal(got[b], best(q8, k8, w8, K))

  def test_it_chooses_nearly_what_bfloat16_does(self):
    q, k, w = (a[0] for a in draw(dim=128, heads=16, tokens=256))
    wide = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)
    want = best(wide(q), wide(k), np.asarray(w), 32)
    at = jnp.arange(256, dtype=jnp.int32)[None]
    query = IndexQuery(q[None], w[None]).encoded()
    keys = FP8Keys(*index_codes.encoded(k[None]))
    cfg = dataclasses.replace(CFG, top_k=32)
    got = np.asarray(dsa.choose(cfg, query, keys, Visibility(at))[0])
    pairs = zip(want[32:], got[32:])
    recall = np.mean([len(set(a) & set(b)) / 32 for a, b in pairs])
    print(f'recall of the float8 choice: {recall:.4f}')
    self.assertBetween(recall, 0.9, 0.9999)


@functools.cache
def layer():
  """A module with random weights, and inputs [2 T D]."""
  made = CFG.build(16, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(made)
  weights = tiny.fill(nnx.to_pure_dict(state))
  x = np.random.default_rng(5).normal(size=(2, T, 16))
  return nnx.merge(graphdef, weights), jnp.asarray(x, jnp.float32)


class LayerTest(parameterized.TestCase):
  def test_its_cache_has_the_keys_and_later_calls_choose_as_the_first(self):
    module, x = layer()
    at = jnp.broadcast_to(jnp.arange(T), (2, T))
    call = lambda n, m, past: module(
      x[:, n:m],
      Context(at[:, n:m] * 0, at[:, n:m], None, fresh=n == 0),
      past,
    )
    empty = CFG.cache(2, T, index_codes.FP8)
    seen = []
    choose = dsa.choose

    def noted(*args, **how):
      seen.append(np.asarray(choose(*args, **how)))
      return jnp.asarray(seen[-1])

    with mock.patch.object(dsa, 'choose', noted):
      _, whole, _ = call(0, T, empty)
      _, past, _ = call(0, 20, empty)
      for n, m in ((20, 21), (21, 40)):
        _, past, _ = call(n, m, past)
    codes, scales = index_codes.encoded(module.index_key(x, at))
    np.testing.assert_array_equal(np.float32(whole.index.codes), codes)
    np.testing.assert_array_equal(whole.index.scales, scales)
    for a, b in zip(past.index, whole.index):
      np.testing.assert_array_equal(np.float32(a), np.float32(b))
    first, *later = seen
    np.testing.assert_array_equal(np.concatenate(later, axis=1), first)


def model(attention, drafts=0, **compute):
  """Returns a model of two layers whose cache is float8."""
  return ds.TransformerConfig(
    tiny.VOCAB,
    32,
    ((('dense',), 2),),
    attention,
    FFNConfig(24),
    mtp=MTPConfig(int(drafts > 0), 'dense'),
    compute=ComputeConfig(cache='float8', **compute),
  )


class AnswersTest(parameterized.TestCase):
  def check(self, attention, drafts=0, **how):
    config = model(attention, drafts)
    variables = tiny.draw(ds.build(config))
    own, _, _ = answers(config, variables, None, drafts, **how)
    pages, seen, run = answers(config, variables, 'reference', drafts, **how)
    for a, b in zip(own, pages, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      logs = [[p.logprob for p in answer.logprobs] for answer in (a, b)]
      # As float8_cache_test has it: the programs' float32 differs by a bit, and
      # so may what is rounded; 5e-5 was seen.
      np.testing.assert_allclose(*logs, rtol=0, atol=2e-3)
      self.assertEqual(a.usage, b.usage)
    # Chosen latents are read in the store's pages; codes reach the indexer.
    self.assertIn('sparse_mla', {op for op, _ in seen})
    op = 'index_candidates' if attention.indexer.blocks else 'indexer'
    told = ' '.join(shapes for o, shapes in seen if o == op)
    self.assertEqual('float8_e4m3fn' in told, op == 'indexer')
    return run

  def test_pages_answer_as_gathered_rows_do(self):
    run = self.check(CFG)
    wanted = plan.cache(run.model.config).configured
    self.assertEqual(wanted, 2 * (128 + 4 + 2 * 4 + I + 4))
    self.assertEqual(paging(build_flat(run.model), 8).token_bytes, wanted)

  @pytest.mark.slow
  def test_so_they_do_with_blocks_first(self):
    run = self.check(BLOCKS)
    wanted = plan.cache(run.model.config, 64).configured / 64
    self.assertEqual(paging(build_flat(run.model), 8).token_bytes, wanted)

  @pytest.mark.slow
  def test_shared_beginnings_with_drafts_and_preempted_answers_do(self):
    run = self.check(CFG, 2, given=shared(), pages=14)
    self.assertGreater(run.stats['preempted'], 0)
    self.assertGreater(run.stats['cached_tokens'], 0)

  @pytest.mark.slow
  def test_shared_beginnings_with_blocks_do(self):
    # One after the other, so that each finds what the one before has filled.
    run = self.check(BLOCKS, given=shared((1, 9)), slots=1)
    self.assertGreater(run.stats['cached_tokens'], 0)

  @pytest.mark.slow
  def test_drafts_with_blocks_do(self):
    run = self.check(BLOCKS, 2, given=shared())
    self.assertGreater(run.stats['accepted_drafts'], 0)


class TracedTest(absltest.TestCase):
  def test_on_hopper_codes_go_to_the_kernel_and_no_row_is_gathered(self):
    sparse = DSAConfig(
      *(2, None, 512, 128, 64, 128), indexer=IndexerConfig(16, 128), top_k=128
    )
    _, choices = program(1, latent=sparse, cache='float8')
    # XLA rounds queries and keys where it makes them.
    impls = {c.impl for c in choices if c.op != 'quantize'}
    self.assertEqual(impls, {'gpu'})
    found = {c.shapes for c in choices if c.op == 'indexer'}
    for shapes in found:
      self.assertStartsWith(shapes, 'float8_e4m3fn[4,2,16,128]')
      self.assertIn('float8_e4m3fn[4,192,128]', shapes)
      self.assertIn('float32[4,192]', shapes)
    self.assertLen(found, 1)


class ConfigTest(absltest.TestCase):
  def test_widths_that_have_no_hadamard_matrix_are_refused_in_a_line(self):
    odd = dataclasses.replace(CFG, indexer=IndexerConfig(4, 12))
    with self.assertRaisesRegex(ds.InputError, 'indexer.dim = 12') as caught:
      model(odd)
    self.assertNotIn('\n', str(caught.exception))


if __name__ == '__main__':
  absltest.main()
