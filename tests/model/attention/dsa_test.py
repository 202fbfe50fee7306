"""Sparse latent attention against float64 and dense attention; its cost."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention import (
  dsa,
  query_blocks,
)
from deepseek_jax.model.attention import (
  dsa_reading as chosen_latents,
)
from deepseek_jax.model.attention.dsa import DSA, DSAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.mla import MLA
from deepseek_jax.model.context import Context
from tests import reference, sparse_reference, tiny

DIM, T, K = 16, 20, 4
BASE = DSAConfig(
  **{f.name: getattr(tiny.MLA, f.name) for f in dataclasses.fields(tiny.MLA)},
  indexer=IndexerConfig(3, 6),
  top_k=K,
  recall_queries=T,
  block=8,
)
BLOCKS = dataclasses.replace(
  BASE, indexer=IndexerConfig(3, 6, blocks=IndexBlocksConfig(2, 3))
)
LITE = dataclasses.replace(BASE, q_rank=None)
DENSE = dataclasses.replace(BASE, stage='dense')
WIDE = dataclasses.replace(BASE, top_k=T)


@functools.cache
def weights(lite=False):
  cfg = LITE if lite else BASE
  module = DSA(cfg, DIM, std=1.0, rngs=nnx.Rngs(0))
  return tiny.fill(nnx.to_pure_dict(nnx.state(module)))


def module(cfg, values=None):
  made = DSA(cfg, DIM, std=1.0, rngs=nnx.Rngs(0))
  values = weights(cfg.q_rank is None) if values is None else values
  return nnx.merge(nnx.split(made)[0], values)


@functools.cache
def inputs():
  x = np.random.default_rng(5).normal(size=(2, T, DIM))
  return jnp.asarray(x, jnp.float32)


@functools.cache
def packed():
  """Documents in a window, with padding at the end of the second row."""
  batch = tiny.documents(2, T, padding=3)
  positions, segments = batch['positions'], batch['segments']
  return Context(positions * 0, positions, segments, train=True)


def context(start=0, length=T, fresh=True, train=False):
  positions = jnp.broadcast_to(jnp.arange(start, start + length), (2, length))
  return Context(positions * 0, positions, None, train, fresh)


@functools.cache
def applied(cfg, packing):
  """(y, statistics) of the inputs, jitted."""
  ctx = packed() if packing else context(train=True)
  run = jax.jit(lambda v, x: module(cfg, v)(x, ctx)[::2])
  return run(weights(cfg.q_rank is None), inputs())


def by_hand(cfg, values, x, chosen=None):
  """Of both packed rows: y, statistics, choices."""
  ctx = jax.tree.map(np.asarray, packed())
  ys, picked, sums = [], [], {'loss': 0.0, 'recall': 0.0}
  for b in range(2):
    given = None if chosen is None else chosen[b]
    y, at, facts = sparse_reference.dsa(
      values, cfg, x[b], ctx.positions[b], ctx.segments[b], given
    )
    valid = ctx.segments[b] > 0
    ys.append(y)
    picked.append(at)
    sums['loss'] += facts[cfg.stage][valid].mean() / 2
    sums['recall'] += facts['recall'][valid].mean() / 2
  return np.stack(ys), sums, picked


class Float64Test(parameterized.TestCase):
  @parameterized.named_parameters(
    ('compressed', BASE), ('plain', LITE), ('in_blocks', BLOCKS)
  )
  def test_output_loss_and_recall_equal_in_packed_documents(self, cfg):
    y, stats = applied(cfg, True)
    values = reference.to_float64(weights(cfg.q_rank is None))
    want, sums, picked = by_hand(cfg, values, np.float64(inputs()))
    self.assertLess(tiny.relative(y, want), 5e-6)
    self.assertGreater(sum(len(at) == K for row in picked for at in row), T)
    for name in ('loss', 'recall'):
      np.testing.assert_allclose(stats[name], sums[name], rtol=2e-5)
    self.assertLess(sums['recall'], 0.95)

  @parameterized.parameters(None, IndexBlocksConfig(2, 3))
  def test_warm_up_reads_all_and_has_the_loss_of_all(self, blocks):
    """Its recall is of what the sparse stage will choose."""
    dense = dataclasses.replace(
      BASE, stage='dense', indexer=IndexerConfig(3, 6, blocks=blocks)
    )
    y, stats = applied(dense, True)
    values = reference.to_float64(weights())
    everything = [
      [sparse_reference.visible(t, row) for t in range(T)]
      for row in np.asarray(packed().segments)
    ]
    x = np.float64(inputs())
    want, sums, _ = by_hand(dense, values, x, everything)
    self.assertLess(tiny.relative(y, want), 5e-6)
    np.testing.assert_allclose(stats['loss'], sums['loss'], rtol=2e-5)
    _, sums, _ = by_hand(dense, values, x)
    np.testing.assert_allclose(stats['recall'], sums['recall'], rtol=2e-5)

  @parameterized.named_parameters(
    ('sparse', BASE), ('dense', DENSE), ('in_blocks', BLOCKS)
  )
  def test_gradient_equals_finite_differences(self, cfg):
    """The output's and the indexer's loss, in random directions."""
    probe = np.random.default_rng(2).normal(size=(2, T, DIM))
    values, x = weights(), inputs()

    @jax.jit
    def gradient(values, x):
      def total(values, x):
        y, _, stats = module(cfg, values)(x, packed())
        return (y * probe).sum() + 3 * stats['loss']

      return jax.grad(total, argnums=(0, 1))(values, x)

    grads = gradient(values, x)
    at, x64 = reference.to_float64(values), np.float64(x)
    if cfg is DENSE:
      chosen = [
        [sparse_reference.visible(t, row) for t in range(T)]
        for row in np.asarray(packed().segments)
      ]
    else:  # held, as choosing has no gradient
      chosen = by_hand(cfg, at, x64)[2]

    def total(moved, x):
      """What is detached stays where it is: only its own part moves."""
      main = {**moved, 'indexer': at['indexer']}
      y = by_hand(cfg, main, x, chosen)[0]
      own = {**at, 'indexer': moved['indexer']}
      return (y * probe).sum() + 3 * by_hand(cfg, own, x64, chosen)[1]['loss']

    for seed in range(2):
      d = jax.tree.map(np.float64, tiny.fill(values, seed))
      dx = np.random.default_rng(seed).normal(size=x.shape)
      step = lambda h, d=d, dx=dx: total(
        jax.tree.map(lambda a, c: a + h * c, at, d), x64 + h * dx
      )
      slope = (step(1e-6) - step(-1e-6)) / 2e-6
      leaves = zip(jax.tree.leaves(grads), jax.tree.leaves((d, dx)))
      got = sum((np.float64(g) * b).sum() for g, b in leaves)
      norm = np.sqrt(
        sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads))
      )
      self.assertAlmostEqual(got / norm, slope / norm, delta=2e-5)


class DenseTest(parameterized.TestCase):
  def mla(self, values, x, ctx):
    plain = MLA(tiny.MLA, DIM, std=1.0, rngs=nnx.Rngs(0))
    values = {k: v for k, v in values.items() if k != 'indexer'}
    return nnx.merge(nnx.split(plain)[0], values)(x, ctx)[0]

  @parameterized.parameters(False, True)
  def test_with_k_keys_or_fewer_it_is_dense_attention_to_the_bit(self, packing):
    ctx = packed() if packing else context()
    want, grad = jax.jit(
      lambda v, x: jax.value_and_grad(
        lambda x: (self.mla(v, x, ctx) ** 2).sum()
      )(x)
    )(weights(), inputs())
    got, ours = jax.jit(
      lambda v, x: jax.value_and_grad(
        lambda x: (module(WIDE, v)(x, ctx)[0] ** 2).sum()
      )(x)
    )(weights(), inputs())
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(ours, grad)

  def test_gathering_everything_is_dense_attention(self):
    """The gathered form itself, given all keys in any order."""
    ctx = packed()
    want = self.mla(weights(), inputs(), ctx)
    one = module(BASE)
    q, keys = (
      one.query(inputs(), ctx.positions),
      one.latent(inputs(), ctx.positions),
    )
    order = np.random.default_rng(0).permutation(T)
    seen = ctx.segments[:, :, None] == ctx.segments[:, None, order]
    seen &= order <= np.arange(T)[:, None]
    chosen = jnp.where(seen, order, -1)
    ups = jnp.split(one.kv_up[...], [BASE.nope_dim], axis=-1)
    read = chosen_latents.read_chosen(
      q, keys, ups, chosen, scale=BASE.scale, most=7
    )
    got = one.project(read.y)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(read.shares.sum(-1), 1, atol=1e-5)

  def test_recall_is_1_where_all_is_chosen(self):
    _, stats = applied(WIDE, True)
    np.testing.assert_allclose(stats['recall'], 1, atol=1e-6)
    np.testing.assert_allclose(
      stats['loss'], applied(DENSE, True)[1]['loss'], rtol=1e-6
    )


class CausalityTest(parameterized.TestCase):
  @parameterized.named_parameters(('flat', BASE), ('in_blocks', BLOCKS))
  def test_a_token_changes_nothing_before_it(self, cfg):
    """Every token in turn, across the borders of blocks."""
    run = jax.jit(lambda v, x: module(cfg, v)(x, context())[0])
    before = np.asarray(run(weights(), inputs()))
    for t in range(T):
      after = run(weights(), inputs().at[:, t].add(1.0))
      np.testing.assert_array_equal(after[:, :t], before[:, :t])
      self.assertGreater(np.abs(after[:, t] - before[:, t]).max(), 1e-3)

  def test_documents_do_not_see_each_other(self):
    segments = jnp.broadcast_to(jnp.arange(T) // 10 + 1, (2, T))
    ctx = context()._replace(segments=segments)
    run = jax.jit(lambda v, x: module(BASE, v)(x, ctx)[0])
    before = run(weights(), inputs())
    first = run(weights(), inputs().at[:, 10:].multiply(-1.0))
    np.testing.assert_array_equal(first[:, :10], before[:, :10])
    second = run(weights(), inputs().at[:, :10].multiply(-1.0))
    np.testing.assert_array_equal(second[:, 10:], before[:, 10:])


class DecodeTest(parameterized.TestCase):
  @parameterized.product(chunk=(1, 3, 7), cfg=(BASE, BLOCKS))
  def test_chunks_and_single_tokens_equal_forward(self, chunk, cfg):
    want = applied(cfg, False)[0]
    step = jax.jit(
      lambda v, x, past, start, fresh: module(cfg, v)(
        x,
        context(0, x.shape[1], fresh)._replace(
          positions=start
          + jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        ),
        past,
      )[:2],
      static_argnums=4,
    )
    past, at = cfg.cache(2, T + 3, jnp.float32), 0
    past = jax.tree.map(lambda a: a + 7, past)  # garbage in empty slots
    while at < T:
      new = inputs()[:, at : at + chunk]
      y, past = step(weights(), new, past, at, at == 0)
      np.testing.assert_allclose(
        y, want[:, at : at + chunk], atol=2e-5, rtol=1e-5
      )
      at += chunk

  def test_ties_fall_alike_in_prefill_and_decoding(self):
    """An indexer of zeros scores everything 0: the first k are read."""
    values = {**weights()}
    values['indexer'] = jax.tree.map(jnp.zeros_like, values['indexer'])
    one = module(BASE, values)

    @jax.jit
    def prefill(x):
      at = context().positions
      query, keys = (f(x, at) for f in (one.index_query, one.index_key))
      empty = BASE.cache(2, T, jnp.float32)
      visibility = query_blocks.visibility(at, None, fresh=True)
      chosen = dsa.choose(BASE, query, keys, visibility)
      return *one(x, context(), empty)[:2], chosen

    want, past, first = prefill(inputs())
    t = T - 1
    y = jax.jit(lambda x: one(x, context(t, 1, False), past)[0])(
      inputs()[:, t:]
    )
    np.testing.assert_allclose(y[:, 0], want[:, t], atol=2e-5, rtol=1e-5)
    np.testing.assert_array_equal(
      first[:, K:], np.tile(range(K), (2, T - K, 1))
    )

  def test_padding_is_not_cached(self):
    ctx = packed()._replace(segments=(packed().segments > 0).astype(int))
    ctx = ctx._replace(positions=context().positions)
    past = module(BASE)(inputs(), ctx, BASE.cache(2, T, jnp.float32))[1]
    self.assertGreater(float(jnp.abs(past.index[0, -1]).max()), 0)
    for a in past[:3]:
      np.testing.assert_array_equal(a[1, -3:], 0)

  def test_v32_caches_576_values_and_128_for_the_indexer(self):
    cache = ds.presets.v32().attention.cache
    shapes = jax.eval_shape(lambda: cache(3, 5, jnp.bfloat16))
    self.assertEqual(tiny.size(shapes[:2]), 3 * 5 * 576)
    self.assertEqual(tiny.size(shapes.index), 3 * 5 * 128)


class DetachTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()

    def parts(values, x):
      y, _, stats = module(BASE, values)(x, packed())
      return (y**2).sum(), stats['loss']

    grad = lambda i: jax.jit(
      jax.grad(lambda v, x: parts(v, x)[i], argnums=(0, 1))
    )(weights(), inputs())
    cls.output, cls.loss = grad(0), grad(1)

  def test_the_output_teaches_the_indexer_nothing(self):
    for g in jax.tree.leaves(self.output[0]['indexer']):
      np.testing.assert_array_equal(g, 0)

  def test_the_indexers_loss_teaches_only_the_indexer(self):
    grads, dx = self.loss
    np.testing.assert_array_equal(dx, 0)
    for name, g in grads.items():
      for leaf in jax.tree.leaves(g):
        largest = float(jnp.abs(leaf).max())
        if name == 'indexer':
          self.assertGreater(largest, 1e-4, name)
        else:
          self.assertEqual(largest, 0, name)

  def test_statistics_are_of_training_only(self):
    self.assertEqual(module(BASE)(inputs(), context())[2], {})


def dot_flops(jaxpr) -> int:
  """Multiply-adds of all matmuls, those in loops as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contract, _), _ = eqn.params['dimension_numbers']
      a = eqn.invars[0].aval.shape
      terms = np.prod([a[i] for i in contract], dtype=int)
      total += int(terms * np.prod(eqn.outvars[0].aval.shape, dtype=int))
    for value in eqn.params.values():
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        total += eqn.params.get('length', 1) * dot_flops(inner)
  return total


class CostTest(parameterized.TestCase):
  """Of growing lengths: linear, where dense attention is quadratic."""

  def program(self, length, **fields):
    cfg = dataclasses.replace(BASE, top_k=16, recall_queries=4, **fields)
    x = jax.ShapeDtypeStruct((1, length, DIM), jnp.float32)

    def total(values, x):
      positions = jnp.arange(length)[None]
      ctx = Context(positions, positions, None, train=True)
      y, _, stats = module(cfg, values)(x, ctx)
      return (y**2).sum() + stats.get('loss', 0)

    return jax.jit(jax.grad(total, argnums=(0, 1))), (weights(), x)

  def core(self, length):
    """Multiply-adds of reading, forward and backward."""
    of = lambda *shape: jax.ShapeDtypeStruct((1, length, *shape), jnp.float32)
    up = lambda width: jax.ShapeDtypeStruct((16, 2, width), jnp.float32)

    def total(q, keys, ups, chosen):
      read = chosen_latents.read_chosen(q, keys, ups, chosen, scale=1.0, most=8)
      return read.y.sum()

    chosen = jax.ShapeDtypeStruct((1, length, 16), jnp.int32)
    grad = jax.grad(total, argnums=(0, 1, 2))
    return dot_flops(
      jax.make_jaxpr(grad)(
        (of(2, 8), of(2, 4)), (of(16), of(4)), (up(8), up(6)), chosen
      ).jaxpr
    )

  def largest(self, length, **fields):
    """Bytes of the compiled program's largest array, and of all temporaries."""
    run, args = self.program(length, **fields)
    compiled = run.lower(*args).compile(
      compiler_options={'xla_backend_optimization_level': 0}
    )
    shapes = re.findall(r'[fsu](?:32|8)\[([\d,]+)\]', compiled.as_text())
    most = max(int(np.prod([int(n) for n in s.split(',')])) for s in shapes)
    return most, compiled.memory_analysis().temp_size_in_bytes

  def test_matmuls_of_the_heads_grow_as_T_times_k(self):
    a, b, c = (self.core(n) for n in (64, 128, 256))
    self.assertEqual((b, c), (2 * a, 4 * a))

  def test_no_array_grows_as_T_squared(self):
    short, long = self.largest(256), self.largest(1024)
    self.assertLess(long[0], 4.1 * short[0])
    self.assertLess(long[1], 4.5 * short[1])
    self.assertLess(long[0], 1024 * 1024 // 2)
    # The same measure sees the dense form, whose blocks are as good as T * T.
    dense = self.largest(1024, stage='dense')
    self.assertGreaterEqual(dense[0], 2 * 128 * 1024)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters('top_k', 'block', 'heads')
  def test_sizes_below_1_are_refused(self, name):
    with self.assertRaisesRegex(ds.InputError, f'{name} = 0: must be'):
      dataclasses.replace(BASE, **{name: 0})

  def test_index_dims_must_hold_the_rotated_ones(self):
    with self.assertRaisesRegex(ds.InputError, 'at least rope_dim = 4'):
      dataclasses.replace(BASE, indexer=IndexerConfig(2, 3))

  def test_is_chosen_by_data(self):
    cfg = dataclasses.replace(tiny.config('mla'), attention=BASE)
    plain = ds.to_dict(cfg)
    self.assertEqual(plain['attention']['kind'], 'dsa')
    self.assertEqual(ds.from_dict(ds.TransformerConfig, plain), cfg)
    stage = ds.changed(cfg, {'attention.stage': 'dense'})
    self.assertEqual(stage.attention, DENSE)


if __name__ == '__main__':
  absltest.main()
