import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.attention.gqa import GQA, GQAConfig
from deepseek_jax.model.context import Context
from tests import reference, tiny

DIM, T = 16, 12


def built(cfg):
  graphdef, state = nnx.split(GQA(cfg, DIM, std=1.0, rngs=nnx.Rngs(0)))
  weights = tiny.fill(nnx.to_pure_dict(state))
  return graphdef, weights


def inputs():
  x = np.random.default_rng(5).normal(size=(2, T, DIM)).astype(np.float32)
  return x, tiny.documents(2, T)


class GQATest(parameterized.TestCase):
  @parameterized.parameters('mha', 'gqa', 'mqa', 'qk_norm')
  def test_equals_float64(self, name):
    cfg = tiny.ATTENTIONS[name]
    graphdef, weights = built(cfg)
    x, batch = inputs()
    ctx = Context(
      jnp.asarray(batch['tokens']),
      jnp.asarray(batch['positions']),
      jnp.asarray(batch['segments']),
    )
    run = jax.jit(lambda w, x: nnx.merge(graphdef, w)(x, ctx)[0])
    got = run(weights, x)
    w = reference.to_float64(weights)
    for b in range(2):
      args = (np.float64(x[b]), batch['positions'][b], batch['segments'][b])
      want = reference.gqa(w, cfg, *args)
      self.assertLess(tiny.relative(got[b], want), 2e-6)

  def test_grouped_is_multi_head_with_repeated_keys(self):
    cfg = tiny.ATTENTIONS['gqa']
    graphdef, weights = built(cfg)
    full, _ = built(dataclasses.replace(cfg, kv_heads=cfg.heads))
    repeated = {
      **weights,
      **{n: jnp.repeat(weights[n], 2, axis=1) for n in 'kv'},
    }
    x, batch = inputs()
    positions = jnp.asarray(batch['positions'])
    ctx = Context(positions, positions, None)
    call = lambda g, w: jax.jit(lambda w, x: nnx.merge(g, w)(x, ctx)[0])(w, x)
    few, many = call(graphdef, weights), call(full, repeated)
    np.testing.assert_allclose(few, many, atol=1e-6)

  def test_normed_heads_forget_the_scale_of_their_projections(self):
    cfg = dataclasses.replace(tiny.ATTENTIONS['qk_norm'], norm_eps=1e-12)
    graphdef, weights = built(cfg)
    x, batch = inputs()
    positions = jnp.asarray(batch['positions'])
    ctx = Context(positions, positions, None)
    run = jax.jit(lambda w, x: nnx.merge(graphdef, w)(x, ctx)[0])
    larger = {**weights, 'q': 8 * weights['q'], 'k': weights['k'] / 4}
    np.testing.assert_allclose(run(larger, x), run(weights, x), atol=1e-5)

  @parameterized.parameters(0, -1e-6, float('nan'))
  def test_norm_eps_is_positive(self, eps):
    with self.assertRaisesRegex(ds.InputError, 'norm_eps'):
      GQAConfig(4, 2, 8, qk_norm=True, norm_eps=eps)

  def test_cache_holds_two_vectors_a_key_head(self):
    cache = tiny.ATTENTIONS['gqa'].cache(3, 5, jnp.bfloat16)
    self.assertEqual(cache.k.shape, (3, 5, 2, 6))
    self.assertEqual(cache.v.shape, (3, 5, 2, 6))

  @parameterized.parameters(
    ((4, 3, 8), 'kv_heads = 3: must divide heads = 4'),
    ((4, 2, 7), 'head_dim = 7: must be even'),
    ((0, 1, 8), 'heads = 0: must be at least 1'),
    ((4, 0, 8), 'kv_heads = 0: must be at least 1'),
  )
  def test_shapes_that_do_not_fit_are_refused(self, shape, message):
    with self.assertRaisesRegex(ds.InputError, message):
      GQAConfig(*shape)


if __name__ == '__main__':
  absltest.main()
