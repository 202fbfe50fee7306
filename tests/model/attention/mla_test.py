"""Latent attention against float64; its two forms against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention.latent_reading import Latent
from deepseek_jax.model.attention.mla import MLA
from deepseek_jax.model.context import Context
from tests import reference, tiny

DIM, T = 16, 20
CONFIGS = [
  ('compressed_query', tiny.MLA),
  ('plain_query', tiny.LITE),
  (
    'half_layout',
    dataclasses.replace(
      tiny.MLA, rope=dataclasses.replace(tiny.YARN, interleaved=False)
    ),
  ),
]


@functools.cache
def built(cfg, dtype=jnp.float32):
  """A module with random weights, the weights as float64, inputs."""
  module = MLA(cfg, DIM, std=1.0, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  weights = tiny.fill(nnx.to_pure_dict(state))
  weights = jax.tree.map(lambda w: w.astype(dtype), weights)
  x = np.random.default_rng(5).normal(size=(2, T, DIM))
  x = jnp.asarray(x, dtype)
  return nnx.merge(graphdef, weights), reference.to_float64(weights), x


def context(positions=None, segments=None, fresh=True):
  if positions is None:
    positions = jnp.broadcast_to(jnp.arange(T), (2, T))
  return Context(positions * 0, positions, segments, fresh=fresh)


def filled(module, x, slots):
  """The cache after all of x, with garbage in the slots beyond."""
  latent = module.latent(x, context().positions)
  rest = lambda a: jnp.full((2, slots - T, a.shape[-1]), 7, a.dtype)
  return Latent(*(jnp.concatenate([a, rest(a)], axis=1) for a in latent))


class MLATest(parameterized.TestCase):
  @parameterized.named_parameters(CONFIGS)
  def test_equals_float64_in_documents_and_caches(self, cfg):
    module, weights, x = built(cfg)
    batch = tiny.documents(2, T)
    segments, positions = batch['segments'], batch['positions']
    ctx = context(jnp.asarray(positions), jnp.asarray(segments))
    y, latent = jax.jit(
      lambda x: (module(x, ctx)[0], module.latent(x, ctx.positions))
    )(x)
    for b in range(2):
      want, c, kr = reference.mla(
        weights, cfg, np.float64(x[b]), positions[b], segments[b]
      )
      # float32 sums of up to 16 products each.
      self.assertLess(tiny.relative(y[b], want), 2e-6)
      self.assertLess(tiny.relative(latent.c[b], c), 2e-6)
      self.assertLess(tiny.relative(latent.kr[b], kr), 2e-6)

  def test_bfloat16_equals_float64_of_the_rounded_weights(self):
    module, weights, x = built(tiny.MLA, jnp.bfloat16)
    y = jax.jit(lambda x: module(x, context())[0])(x)
    self.assertEqual(y.dtype, jnp.bfloat16)
    for b in range(2):
      want = reference.mla(
        weights, tiny.MLA, np.float64(x[b]), range(T), np.ones(T)
      )[0]
      # Five roundings to 8 bits in a row, partly averaged out.
      self.assertLess(tiny.relative(y[b], want), 2e-2)

  @parameterized.named_parameters(CONFIGS[:2])
  def test_absorbed_equals_expanded(self, cfg):
    module, _, x = built(cfg)

    @jax.jit
    def both(x):
      qn, qr = module.query(x, context().positions)
      past = filled(module, x, T + 5)
      y = module.absorbed(qn, qr, past, context().positions)
      y = jnp.einsum('BTHV,HVD->BTD', y, module.out[...])
      return y, module(x, context())[0]

    got, want = both(x)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)

  def test_either_form_reads_the_cache_alike(self):
    module, _, x = built(tiny.MLA)
    want, past = jax.jit(
      lambda x: (module(x, context())[0], filled(module, x, T + 5))
    )(x)
    call = jax.jit(
      lambda x, at, past: module(x, context(at, fresh=False), past)
    )
    for queries in (1, 3, T - 1):  # one token, a draft, a chunk of a prompt
      new = x[:, -queries:]
      at = context().positions[:, -queries:]
      blank = jax.tree.map(lambda a, n=queries: a.at[:, T - n : T].set(9), past)
      got, cache, _ = call(new, at, blank)
      np.testing.assert_allclose(got, want[:, -queries:], atol=1e-5, rtol=1e-5)
      for a, b in zip(cache, past):
        np.testing.assert_allclose(a, b, atol=1e-6)
    self.assertTrue(module.absorbing_pays(3))
    self.assertFalse(module.absorbing_pays(T - 1))

  def test_padding_is_not_cached(self):
    module, _, x = built(tiny.MLA)
    segments = jnp.ones((2, T), jnp.int32).at[1, 12:].set(0)
    empty = tiny.MLA.cache(2, T + 2, jnp.float32)
    cache = jax.jit(lambda x: module(x, context(segments=segments), empty)[1])(
      x
    )
    self.assertGreater(float(jnp.abs(cache.c[0, :T]).min(axis=-1).max()), 0)
    np.testing.assert_array_equal(cache.c[1, 12:], 0)
    np.testing.assert_array_equal(cache.kr[1, 12:], 0)
    np.testing.assert_array_equal(cache.c[0, T:], 0)

  def test_v3_caches_576_values_a_token(self):
    cache = ds.presets.v3().attention.cache
    shapes = jax.eval_shape(lambda: cache(3, 5, jnp.bfloat16))
    self.assertEqual(tiny.size(shapes), 3 * 5 * 576)
    self.assertEqual(shapes.c.shape, (3, 5, 512))

  @parameterized.parameters('heads', 'kv_rank', 'nope_dim', 'rope_dim', 'v_dim')
  def test_sizes_below_1_are_refused(self, name):
    with self.assertRaisesRegex(ds.InputError, f'{name} = 0: must be'):
      dataclasses.replace(tiny.MLA, **{name: 0})

  def test_odd_rope_dims_are_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'rope_dim = 3: must be even'):
      dataclasses.replace(tiny.MLA, rope_dim=3)


if __name__ == '__main__':
  absltest.main()
