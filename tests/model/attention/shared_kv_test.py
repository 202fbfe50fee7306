"""V4's attention against float64: what is read, by whom, whole or in chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention import (
  compressor,
  indexer_loss,
  ring,
)
from deepseek_jax.model.attention import (
  partial_softmax as partial_attention,
)
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.csa_entries import EntryAttention
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.rope import RopeConfig, YarnConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.context import Context
from pallas_kernels import dispatch
from tests import reference, tiny
from tests.model.attention import v4_reference

DIM, T = 12, 37
YARN = YarnConfig(
  factor=4.0,
  original_length=16,
  mscale=None,
  mscale_all_dim=None,
  attention_factor=1.0,
)
WINDOW = SharedKVConfig(
  heads=4,
  head_dim=10,
  rope_dim=4,
  q_rank=6,
  groups=2,
  o_rank=5,
  window=5,
  rope=RopeConfig(theta=100.0),
  compress_rope=RopeConfig(theta=300.0, scaling=YARN),
  csa=CSAConfig(
    ratio=4, top_k=3, index_heads=2, index_dim=6, recall_queries=T, block=16
  ),
  hca=HCAConfig(ratio=8),
)
CSA = dataclasses.replace(WINDOW, compress='csa')
ALL = dataclasses.replace(CSA, csa=dataclasses.replace(CSA.csa, top_k=100))
DENSE = dataclasses.replace(
  CSA, csa=dataclasses.replace(CSA.csa, stage='dense')
)
HCA = dataclasses.replace(WINDOW, compress='hca')
CONFIGS = (('window', WINDOW), ('csa', CSA), ('csa_all', ALL), ('hca', HCA))


def jit(f, **flags):
  """Compiled quickly: these programs are small."""
  options = {'xla_backend_optimization_level': 0}
  return jax.jit(f, compiler_options=options, **flags)


@functools.cache
def built(cfg):
  """(weights, x) -> module's result; weights; weights in float64; x."""
  module = cfg.build(DIM, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    x = rng.normal(size=leaf.shape)
    if 'scale' in name:
      x = 1 + 0.3 * x
    elif leaf.ndim > 2 or 'kv' in name or 'down' in name:
      x = 0.5 * x
    return jnp.float32(x)

  weights = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state))
  x = jnp.float32(rng.normal(size=(2, T, DIM)))
  merge = lambda w: nnx.merge(graphdef, w)
  return merge, weights, reference.to_float64(weights), x


def context(positions=None, segments=None, **flags):
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
  return Context(positions * 0, positions, segments, **flags)


def context_of(segments):
  """In training, of rows that are one document and padding."""
  return context(
    jnp.broadcast_to(jnp.arange(T), segments.shape), segments, train=True
  )


@functools.cache
def forward(cfg):
  """x [B T D] -> y, of whole rows; compiled once."""
  merge, weights, _, _ = built(cfg)
  return jit(
    lambda x, ctx: merge(weights)(x, ctx._replace(train=False, fresh=True))[0]
  )


class LayerTest(parameterized.TestCase):
  @parameterized.named_parameters(*CONFIGS)
  def test_equals_float64_and_documents_are_apart(self, cfg):
    _, _, p, x = built(cfg)
    segments = np.zeros((2, T), np.int32)
    positions = np.zeros((2, T), np.int32)
    spans = [[(0, T)], [(0, 6), (6, 25), (25, 33)]]  # and four of padding
    for b, row in enumerate(spans):
      for n, (i, j) in enumerate(row, start=1):
        segments[b, i:j], positions[b, i:j] = n, np.arange(j - i)
    ctx = context(jnp.asarray(positions), jnp.asarray(segments))
    y = forward(cfg)(x, Context(*ctx[:3], None, None))
    self.assertTrue(np.isfinite(y).all())
    for b, row in enumerate(spans):
      for i, j in row:
        want, _ = v4_reference.layer(p, cfg, np.float64(x[b, i:j]))
        # float32 sums of up to 20 products in a row of five.
        self.assertLess(tiny.relative(y[b, i:j], want), 2e-5)

  @parameterized.named_parameters(*CONFIGS[2:])
  @pytest.mark.slow
  def test_a_query_sees_the_entries_of_complete_windows(self, cfg):
    """Exactly floor((t + 1) / m) of them, and beyond its window no more."""
    cfg = dataclasses.replace(
      cfg, window=2, csa=dataclasses.replace(cfg.csa, top_k=100)
    )
    merge, weights, _, x = built(cfg)
    m = cfg.compressor().ratio
    n = 4 * m + 2
    way = jnp.float32(np.random.default_rng(1).normal(size=(n, DIM)))
    at = jnp.arange(n)[None]

    def outputs(x):
      y = merge(weights)(x[None], Context(at * 0, at, None))[0]
      return (y[0] * way).sum(axis=-1)

    slopes = jit(jax.jacrev(outputs))(jnp.tile(x[0], (2, 1))[:n])
    depends = np.abs(slopes).max(axis=-1) > 0
    for t in range(n):
      for s in range(n):
        near = t - 2 < s <= t
        entry = s // m < (t + 1) // m
        self.assertEqual(depends[t, s], near or entry, (t, s))

  @parameterized.named_parameters(*CONFIGS)
  def test_nothing_before_a_changed_token_changes(self, cfg):
    x, ctx = built(cfg)[3], context()
    run = lambda x: forward(cfg)(x, Context(*ctx[:3], None, None))
    y = run(x)
    for t in (0, 3, 4, 7, 8, 15, 16, 23, 31, T - 1):
      changed = run(x.at[:, t].add(1.0))
      np.testing.assert_array_equal(changed[:, :t], y[:, :t])
      self.assertGreater(float(jnp.abs(changed[:, t] - y[:, t]).max()), 1e-3)

  @parameterized.named_parameters(
    *CONFIGS[:1], *CONFIGS[3:], ('csa_dense', DENSE)
  )
  @pytest.mark.slow
  def test_gradients_of_other_layers_equal_central_differences(self, cfg):
    self.assert_gradients_right(cfg)

  def test_gradients_equal_central_differences_in_float64(self):
    self.assert_gradients_right(CSA)

  def assert_gradients_right(self, cfg):
    merge, weights, p, x = built(cfg)
    rng = np.random.default_rng(2)
    way, n = rng.normal(size=(2, T, DIM)), 21

    def value(weights, x):
      y, _, stats = merge(weights)(
        x[:1, :n], context(jnp.arange(n)[None], train=True)
      )
      return (y * way[:1, :n]).sum() + stats.get('loss', 0.0)

    grads = jit(jax.grad(value, (0, 1)))(weights, x)

    def truth(p, x, learn):
      y, facts = v4_reference.layer(p, cfg, x[0, :n])
      # The indexer learns from its loss alone, the rest from the output alone.
      return np.mean(facts['loss']) if learn else (y * way[0, :n]).sum()

    point = (p, np.float64(x))
    paths, tree = jax.tree_util.tree_flatten_with_path(point)
    for i, ((path, leaf), grad) in enumerate(
      zip(paths, jax.tree.leaves(grads))
    ):
      name = jax.tree_util.keystr(path)
      direction = rng.normal(size=leaf.shape)

      def along(t, i=i, direction=direction, name=name):
        leaves = [leaf for _, leaf in paths]
        leaves[i] = leaves[i] + t * direction
        return truth(*jax.tree.unflatten(tree, leaves), 'indexer' in name)

      slope = (along(1e-6) - along(-1e-6)) / 2e-6
      got = (np.float64(grad) * direction).sum()
      np.testing.assert_allclose(got, slope, rtol=2e-3, atol=2e-3, err_msg=name)
      self.assertGreater(float(jnp.abs(grad).max()), 0, name)

  @parameterized.named_parameters(*CONFIGS[1:3], ('csa_dense', DENSE))
  def test_the_indexers_loss_and_recall_equal_float64(self, cfg):
    merge, weights, p, x = built(cfg)
    stats = jit(lambda x: merge(weights)(x, context(train=True))[2])(x)
    rows = [v4_reference.layer(p, cfg, np.float64(a))[1] for a in x]
    for name in ('loss', 'recall'):
      want = np.mean([row[name] for row in rows])
      np.testing.assert_allclose(stats[name], want, rtol=1e-4, err_msg=name)
    self.assertEqual(cfg is ALL, bool(stats['recall'] > 0.999))

  @parameterized.named_parameters(('csa', CSA), ('csa_dense', DENSE))
  def test_a_head_teaches_by_what_it_spends_on_entries(self, cfg):
    """Heads' sinks leave 1e-1 to 1e-90 of the softmax to the entries."""
    merge, weights, p, x = built(cfg)
    stats = jit(
      lambda w, x: merge(w)(x[:1], context(jnp.arange(T)[None], train=True))[2]
    )
    losses = []
    for sinks in ([0, 200, 203, 207], [200, 0, 203, 207], [206, 207, 203, 207]):
      sinks = np.float64(sinks)
      got = stats(weights | {'sinks': jnp.float32(sinks)}, x)
      want = v4_reference.layer(p | {'sinks': sinks}, cfg, np.float64(x[0]))[1]
      for name in ('loss', 'recall'):
        # The differences of logs of size 200 have 5 digits.
        np.testing.assert_allclose(
          got[name], np.mean(want[name]), rtol=1e-3, err_msg=f'{name} {sinks}'
        )
      losses.append(float(got['loss']))
    self.assertGreater(min(np.abs(np.diff(losses))), 1e-2)

  def test_so_it_does_by_a_kernel_down_to_what_float32_holds(self):
    merge, weights, p, x = built(CSA)

    def stats(sinks):
      with dispatch.using('reference'), dispatch.recorded() as found:
        run = lambda w: merge(w)(
          x[:1], context(jnp.arange(T)[None], train=True)
        )
        got = jit(run)(weights | {'sinks': jnp.float32(sinks)})[2]
      self.assertIn('attention_shares', {c.op for c in found})
      return got

    for sinks in ([0, 100, 103, 107], [156, 157, 153, 157]):
      got, sinks = stats(sinks), np.float64(sinks)
      want = v4_reference.layer(p | {'sinks': sinks}, CSA, np.float64(x[0]))[1]
      for name in ('loss', 'recall'):
        np.testing.assert_allclose(
          got[name], np.mean(want[name]), rtol=1e-3, err_msg=f'{name} {sinks}'
        )
    # Nothing is left of 1e-90: no query has a target.
    self.assertEqual(float(stats([206, 207, 203, 207])['loss']), 0.0)

  def test_positions_and_documents_may_be_numpy_arrays(self):
    merge, weights, _, x = built(CSA)
    at = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    ctx = Context(at, at, np.ones_like(at))
    run = jit(jax.checkpoint(lambda x: merge(weights)(x, ctx)[0]))
    want = forward(CSA)(x, Context(*context()[:3], None, None))
    self.assertLess(tiny.relative(run(x), want), 1e-5)

  def test_a_single_sampled_query_is_the_last(self):
    at, counts = indexer_loss.sampled(6, 1, 2)
    self.assertEqual(at[counts > 0].tolist(), [5])
    self.assertEqual(counts.tolist(), [[0], [1]])
    at, counts = indexer_loss.sampled(6, 3, 1)
    self.assertEqual(at[counts > 0].tolist(), [0, 2, 5])

  def test_statistics_of_a_batch_are_the_mean_of_its_rows(self):
    merge, weights, _, x = built(CSA)
    segments = jnp.asarray(np.arange(T) < np.array([[T], [9]]), jnp.int32)
    run = jit(lambda x, s: merge(weights)(x, context_of(s))[2])
    both = run(x, segments)
    alone = [run(x[b : b + 1], segments[b : b + 1]) for b in range(2)]
    for name in ('loss', 'recall'):
      want = np.mean([row[name] for row in alone])
      np.testing.assert_allclose(both[name], want, rtol=1e-5, err_msg=name)
    self.assertNotAlmostEqual(*(float(row['loss']) for row in alone))

  def test_the_dense_stage_reads_all_entries(self):
    x = built(CSA)[3]
    run = lambda cfg: forward(cfg)(x, Context(*context()[:3], None, None))
    np.testing.assert_array_equal(run(DENSE), run(ALL))
    self.assertGreater(tiny.relative(run(CSA), run(ALL)), 1e-2)

  def test_equal_scores_pick_the_lowest_entry(self):
    merge, weights, _, x = built(CSA)
    zero = jnp.zeros_like(weights['far']['indexer']['weights'])
    weights = jax.tree.map(lambda a: a, weights)
    weights['far']['indexer']['weights'] = zero

    @jit
    def choose(x):
      far, ctx = merge(weights).far, context()
      keys, _ = far.indexer.compressor(x, ctx, None)
      query = far.indexer.query(x, x[..., :6], ctx.positions)
      # -0.0 and 0.0 are equal scores, too.
      query = query._replace(weight=query.weight.at[:, ::2].set(-0.0))
      view = compressor.view(ctx, 4, True)
      cfg = CSAConfig(top_k=3, block=16)
      return EntryAttention(cfg, None, query, view, None, keys, 1.0).choose()

    chosen = choose(x)
    for t in range(T):
      seen = list(range(min((t + 1) // 4, 3)))
      want = seen + [-1] * (3 - len(seen))
      self.assertEqual(chosen[0, t].tolist(), want)


class ChunkTest(parameterized.TestCase):
  @parameterized.named_parameters(('csa_5', CSA, 5), ('hca_7', HCA, 7))
  def test_chunks_equal_one_pass(self, cfg, size):
    self.assert_chunks_equal(cfg, size)

  @parameterized.named_parameters(
    ('window_1', WINDOW, 1),
    ('csa_1', CSA, 1),
    ('csa_3', CSA, 3),
    ('csa_4', CSA, 4),
    ('hca_1', HCA, 1),
    ('hca_8', HCA, 8),
    ('hca_9', HCA, 9),
  )
  @pytest.mark.slow
  def test_chunks_of_every_size_equal_one_pass(self, cfg, size):
    self.assert_chunks_equal(cfg, size)

  def assert_chunks_equal(self, cfg, size):
    """Also when a row's tokens end within a chunk; from an empty cache on."""
    merge, weights, _, x = built(cfg)
    want = forward(cfg)(x, Context(*context()[:3], None, None))

    @jit
    def step(x, positions, segments, past):
      ctx = Context(positions, positions, segments, fresh=False)
      return merge(weights)(x, ctx, past)[:2]

    past = cfg.cache(2, T, jnp.float32)
    past = jax.tree.map(lambda a: a + 7, past)  # nothing of it may be read
    done, got = np.zeros(2, int), np.zeros(want.shape, np.float32)
    rng = np.random.default_rng(0)
    while (done < T).any():
      new = np.minimum(size, T - done)
      if size > 1:  # ragged: one row takes fewer
        row = rng.integers(2)
        new[row] = min(new[row], rng.integers(0, size + 1))
      at = done[:, None] + np.arange(size)
      valid = (np.arange(size) < new[:, None]).astype(np.int32)
      rows = np.arange(2)[:, None]
      part = np.where(valid[..., None], x[rows, np.minimum(at, T - 1)], 99.0)
      y, past = step(part.astype(np.float32), at, valid, past)
      for b in range(2):
        got[b, done[b] : done[b] + new[b]] = y[b, : new[b]]
      done += new
    self.assertLess(tiny.relative(got, want), 1e-5)

  @parameterized.named_parameters(*(CONFIGS[1:2] + CONFIGS[3:]))
  @pytest.mark.slow
  def test_a_fresh_prompt_leaves_what_chunks_leave(self, cfg):
    merge, weights, _, x = built(cfg)
    empty = cfg.cache(2, T, jnp.float32)

    @functools.partial(jit, static_argnums=0)
    def run(fresh, x, past):
      at = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
      return merge(weights)(x, Context(at, at, None, fresh=fresh), past)

    whole = run(True, x[:, :22], empty)
    parts = run(False, x[:, :22], empty)
    self.assertLess(tiny.relative(whole[0], parts[0]), 1e-5)
    for a, b in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(parts[1])):
      np.testing.assert_allclose(a, b, atol=1e-5)


class PartsTest(parameterized.TestCase):
  def test_window_blocks_equal_a_mask(self):
    rng = np.random.default_rng(0)
    n, w = 300, 7  # three blocks, the last one short
    q = jnp.float32(rng.normal(size=(2, n, 3, 4)))
    k = jnp.float32(rng.normal(size=(2, n, 4)))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, n)), axis=1))

    def blocks(q, k):
      part = partial_attention.window_attention(q, k, segments, w, scale=0.5)
      return (part.out * jnp.cos(jnp.arange(4.0))).sum() + part.log_sum.sum()

    def mask(q, k):
      gap = jnp.arange(n)[:, None] - jnp.arange(n)
      seen = (gap >= 0) & (gap < w) & (segments[..., None] == segments[:, None])
      part, _ = partial_attention.attend(q, k, seen, 0.5)
      return (part.out * jnp.cos(jnp.arange(4.0))).sum() + part.log_sum.sum()

    got = jit(jax.value_and_grad(blocks, (0, 1)))(q, k)
    want = jit(jax.value_and_grad(mask, (0, 1)))(q, k)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1]):
      np.testing.assert_allclose(a, b, atol=1e-5)

  def test_parts_join_to_one_softmax_with_a_sink(self):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(1, 2, 3, 4)), rng.normal(size=(1, 9, 4))
    sinks = np.array([-50.0, 0.7, 60.0])
    seen = rng.random((1, 2, 9)) < 0.6
    seen[0, 0, :5] = False  # the first part shows the first query nothing
    parts = [
      partial_attention.attend(
        jnp.float32(q), jnp.float32(k[:, cut]), seen[..., cut], 0.5
      )[0]
      for cut in (slice(0, 5), slice(5, 9))
    ]
    got = partial_attention.join(parts, jnp.float32(sinks))
    for t in range(2):
      for h in range(3):
        at = np.flatnonzero(seen[0, t])
        z = np.append(k[0, at] @ q[0, t, h] * 0.5, sinks[h])
        want = reference.softmax(z)[:-1] @ k[0, at]
        np.testing.assert_allclose(got[0, t, h], want, atol=1e-6)

  def test_a_ring_holds_the_last_tokens_in_order(self):
    at = jnp.array([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]])
    valid = jnp.array([[True] * 5, [True, True, False, False, False]])
    held = ring.write(jnp.full((2, 4), -1), at * 10, at, valid)
    self.assertEqual(held[0].tolist(), [40, 50, 60, 70])
    self.assertEqual(held[1].tolist(), [0, 10, -1, -1])
    last = ring.unroll(held, jnp.array([8, 2]), 4)
    self.assertEqual(last[0].tolist(), [50, 60, 70])
    self.assertEqual(ring.before(jnp.array([2]), 4).tolist(), [[-1, 0, 1]])
    self.assertEqual(last[1, 1:].tolist(), [0, 10])


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    'heads', 'head_dim', 'q_rank', 'groups', 'o_rank', 'window'
  )
  def test_sizes_below_1_are_refused(self, name):
    with self.assertRaisesRegex(ds.InputError, f'{name} = 0: must be'):
      dataclasses.replace(WINDOW, **{name: 0})

  def test_what_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'groups = 3: must divide'):
      dataclasses.replace(WINDOW, groups=3)
    with self.assertRaisesRegex(ds.InputError, 'rope_dim = 8: must be even'):
      dataclasses.replace(CSA, rope_dim=8)
    with self.assertRaisesRegex(ds.InputError, r'csa\.top_k = 0: must be'):
      CSAConfig(top_k=0)
    with self.assertRaisesRegex(ds.InputError, r'hca\.ratio = 0: must be'):
      HCAConfig(ratio=0)

  def test_the_cache_holds_what_the_papers_count(self):
    flash = SharedKVConfig(64, 512, 64, 1024, 8, 1024)
    sizes = {}
    for kind in ('none', 'csa', 'hca'):
      cfg = dataclasses.replace(flash, compress=kind)
      make = lambda n, c=cfg: jax.eval_shape(
        lambda: c.cache(1, n, jnp.bfloat16)
      )
      sizes[kind] = tiny.size(make(4096 + 1280)) - tiny.size(make(1280))
    # Per token: 512 values per 128, and 512 and 128 per 4.
    self.assertEqual(sizes, {'none': 0, 'csa': 1024 * 640, 'hca': 32 * 512})


if __name__ == '__main__':
  absltest.main()
