"""The lightning indexer against float64, and its rule for ties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention.indexer import (
  Indexer,
  IndexerConfig,
  IndexQuery,
  LayerNorm,
  best,
  choose,
  divergence,
  index_scores,
)
from deepseek_jax.model.attention.query_blocks import Visibility, over_blocks
from tests import reference, sparse_reference, tiny

DIM, LATENT, T = 16, 12, 14
# An odd number of index dims beyond the 4 rotated ones.
SHAPES = IndexerConfig(heads=3, dim=7)


@dataclasses.dataclass(frozen=True)
class Around:
  """The fields of an attention that its indexer reads."""

  indexer: IndexerConfig
  rope_dim: int = 4
  rope: object = tiny.YARN


@functools.cache
def scored(interleaved):
  cfg = Around(dataclasses.replace(SHAPES, interleaved=interleaved))
  make = {'std': 1.0, 'rngs': nnx.Rngs(0)}
  module = Indexer(cfg.indexer, DIM, LATENT, cfg.rope_dim, cfg.rope, **make)
  graphdef, state = nnx.split(module)
  weights = tiny.fill(nnx.to_pure_dict(state))
  rng = np.random.default_rng(3)
  x = rng.normal(size=(1, T, DIM)).astype(np.float32)
  latent = rng.normal(size=(1, T, LATENT)).astype(np.float32)
  positions = jnp.arange(5, 5 + T)[None]

  @jax.jit
  def run(weights, x, latent):
    module = nnx.merge(graphdef, weights)
    keys = module.key(x, positions)
    return index_scores(module.query(x, latent, positions), keys)

  got = run(weights, x, latent)[0]
  want = lambda weights, cfg=cfg: sparse_reference.index_scores(
    reference.to_float64(weights),
    cfg,
    np.float64(x[0]),
    np.float64(latent[0]),
    range(5, 5 + T),
  )[0]
  return got, want, weights, cfg


class ScoresTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_equal_float64(self, interleaved):
    got, want, weights, _ = scored(interleaved)
    self.assertLess(tiny.relative(got, want(weights)), 5e-6)

  def test_layouts_of_rope_differ(self):
    got, _, weights, _ = scored(False)
    _, other, _, _ = scored(True)
    self.assertGreater(tiny.relative(got, other(weights)), 0.05)

  def test_the_bias_of_the_key_norm_counts(self):
    got, want, weights, _ = scored(False)
    plain = jax.tree.map(lambda a: a, weights)
    plain['k_norm']['bias'] = 0 * plain['k_norm']['bias']
    self.assertGreater(tiny.relative(got, want(plain)), 0.02)

  def test_keys_are_normed_about_their_mean(self):
    x = 3 + np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    norm = LayerNorm(7, eps=1e-6, rngs=nnx.Rngs(0))
    y = np.asarray(norm(x))
    np.testing.assert_allclose(y.mean(axis=-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(axis=-1), 1, atol=1e-5)

  def test_no_softmax_multiplier_of_yarn_enters(self):
    """Scores keep their size under another mscale, as rope only turns."""
    scaling = dataclasses.replace(
      tiny.YARN.scaling, mscale=2.0, mscale_all_dim=2.0
    )
    got, _, weights, cfg = scored(False)
    rope = dataclasses.replace(cfg.rope, scaling=scaling)
    make = {'std': 1.0, 'rngs': nnx.Rngs(0)}
    module = Indexer(cfg.indexer, DIM, LATENT, 4, rope, **make)
    module = nnx.merge(nnx.split(module)[0], weights)
    rng = np.random.default_rng(3)
    x = rng.normal(size=(1, T, DIM)).astype(np.float32)
    latent = rng.normal(size=(1, T, LATENT)).astype(np.float32)
    at = jnp.arange(5, 5 + T)[None]
    again = index_scores(module.query(x, latent, at), module.key(x, at))[0]
    np.testing.assert_allclose(again, got, rtol=1e-5, atol=1e-6)


class ChoiceTest(parameterized.TestCase):
  def test_of_equal_scores_the_lowest_place_wins(self):
    scores = jnp.array([[[1.0, 2, 1, 2, 0, -0.0, 0, 2]]])
    seen = jnp.ones((1, 1, 8), bool).at[..., 7].set(False)
    got = best(scores, seen, 6)[0, 0]
    np.testing.assert_array_equal(got, [0, 1, 2, 3, 4, 5])
    few = best(scores, seen, 3)[0, 0]
    np.testing.assert_array_equal(few, [0, 1, 3])

  def test_minus_zero_is_zero(self):
    """Negative weights make -0 where no head fires."""
    scores = jnp.array([[[-0.0, 0.0, -0.0, 0.0]]])
    got = best(scores, jnp.ones((1, 1, 4), bool), 2)[0, 0]
    np.testing.assert_array_equal(got, [0, 1])

  def test_what_is_not_seen_is_never_chosen(self):
    scores = jnp.full((1, 3, 5), 9.0).at[..., 0].set(-5)
    seen = jnp.arange(5) <= jnp.arange(3)[:, None]
    got = np.asarray(best(scores, seen[None], 4)[0])
    np.testing.assert_array_equal(
      got, [[0, -1, -1, -1], [0, 1, -1, -1], [0, 1, 2, -1]]
    )

  @parameterized.parameters(1, 3, 128)
  def test_blocks_choose_what_brute_force_chooses(self, most):
    rng = np.random.default_rng(1)
    # Small whole numbers: ties abound.
    q = rng.integers(-2, 3, (2, T, 2, 3)).astype(np.float32)
    w = rng.integers(-2, 3, (2, T, 2)).astype(np.float32)
    k = rng.integers(-2, 3, (2, T, 3)).astype(np.float32)
    segments = np.repeat([[1, 2], [3, 0]], T // 2, axis=1)
    places = np.broadcast_to(np.arange(T), (2, T))
    visibility = Visibility(jnp.asarray(places), jnp.asarray(segments))
    got = choose(
      IndexQuery(q, w), k, visibility, 5, key_segments=segments, most=most
    )
    scores = np.einsum(
      'btjs,btj->bts', np.maximum(np.einsum('btji,bsi->btjs', q, k), 0), w
    )
    ties = 0
    for b in range(2):
      for t in range(T):
        seen = sparse_reference.visible(t, segments[b])
        want = sparse_reference.ranked(scores[b, t], seen)[:5]
        ties += len(set(scores[b, t, seen])) < len(seen)
        found = [s for s in np.asarray(got[b, t]) if s >= 0]
        self.assertEqual(found, sorted(want))
    self.assertGreater(ties, T)

  def test_choosing_has_no_gradient(self):
    q = jnp.ones((1, 4, 1, 2))
    k = jnp.arange(8.0).reshape(1, 4, 2)
    visibility = Visibility(jnp.arange(4)[None])

    def total(q, k):
      at = choose(IndexQuery(q, q[..., 0]), k, visibility, 2)
      return (at * q[:, :, 0, :1]).sum()

    np.testing.assert_array_equal(jax.grad(total, argnums=1)(q, k), 0)


class DivergenceTest(absltest.TestCase):
  def test_equals_the_sum_over_visible_keys(self):
    rng = np.random.default_rng(0)
    p = rng.random((3, 6)) * [1, 1, 0, 1, 1, 0]
    p /= p.sum(-1, keepdims=True)
    seen = np.array([True, True, True, True, True, False] * 3).reshape(3, 6)
    logits = rng.normal(size=(3, 6))
    got = divergence(jnp.float32(p), jnp.float32(logits), seen)
    for row in range(3):
      want = sparse_reference.kl(p[row, :5], logits[row, :5])
      self.assertAlmostEqual(float(got[row]), want, places=5)

  def test_is_zero_at_its_own_softmax_and_teaches_only_the_logits(self):
    logits = jnp.array([0.3, -1.0, 2.0, 7.0])
    seen = jnp.array([True, True, True, False])
    p = jax.nn.softmax(jnp.where(seen, logits, -1e30))
    value, (dp, dl) = jax.value_and_grad(divergence, argnums=(0, 1))(
      p, logits + jnp.array([0, 1.0, 0, 0]), seen
    )
    self.assertGreater(float(value), 0.01)
    np.testing.assert_array_equal(dp, 0)
    want = (
      jax.nn.softmax(jnp.where(seen, logits + jnp.array([0, 1, 0, 0]), -1e30))
      - p
    )
    np.testing.assert_allclose(dl, want, atol=1e-6)
    self.assertAlmostEqual(float(divergence(p, logits, seen)), 0, places=6)


class BlocksTest(parameterized.TestCase):
  @parameterized.parameters((7, 3), (8, 4), (5, 1), (6, 99))
  def test_blocks_change_nothing(self, length, most):
    x = jnp.arange(2.0 * length * 3).reshape(2, length, 3)
    seen = []

    def f(one):
      seen.append(one['x'].shape[1])
      return one['x'] ** 2, one['x'].sum(-1)

    a, b = over_blocks(f, {'x': x, 'none': None}, most)
    np.testing.assert_array_equal(a, x**2)
    np.testing.assert_array_equal(b, x.sum(-1))
    self.assertLessEqual(max(seen), most)

  def test_big_blocks_are_made_smaller(self):
    sizes = []

    def f(x):
      sizes.append(x.shape[1])
      return x

    jax.eval_shape(
      lambda x: over_blocks(f, x, 64, numbers=1 << 22), jnp.zeros((4, 64))
    )
    self.assertEqual(max(sizes), 4)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters('heads', 'dim')
  def test_sizes_below_1_are_refused(self, name):
    with self.assertRaisesRegex(ds.InputError, f'indexer.{name} = 0: must be'):
      dataclasses.replace(SHAPES, **{name: 0})


if __name__ == '__main__':
  absltest.main()
