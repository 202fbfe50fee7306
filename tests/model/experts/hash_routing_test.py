"""V4's router and clamp: sqrt-softplus, a fixed table, SwiGLU's limit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from flax import nnx

import deepseek_jax as ds
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts import ffn, moe
from deepseek_jax.model.experts import router as lib
from deepseek_jax.model.experts.router import Router, RouterConfig
from tests import tiny

V4 = RouterConfig(scoring='sqrtsoftplus', scale=1.5)
HASH = RouterConfig(
  scoring='sqrtsoftplus', scale=1.5, bias=False, hash_vocab=tiny.VOCAB
)


def router(cfg, seed=0):
  return Router(cfg, 16, 8, 3, std=1.0, rngs=nnx.Rngs(seed))


def inputs(padding=0):
  x = jnp.float32(np.random.default_rng(0).normal(size=(2, 5, 16)))
  tokens = jnp.asarray(tiny.tokens(2, 5))
  segments = jnp.ones((2, 5), jnp.int32).at[1, 5 - padding :].set(0)
  positions = jnp.broadcast_to(jnp.arange(5), (2, 5))
  return x, Context(tokens, positions, segments)


class ScoreTest(parameterized.TestCase):
  def test_scores_are_the_root_of_softplus(self):
    x = np.array([-60.0, -21, -19, -3, -1e-3, 0, 0.5, 20, 90, 1e4])
    want = np.sqrt(np.logaddexp(0, x))
    got = lib.score(jnp.float32(x), 'sqrtsoftplus')
    # Below -20 the root of softplus(x) is exp(x / 2) to 1e-9.
    np.testing.assert_allclose(got, want, rtol=2e-6)

  def test_their_slopes_are_finite_and_right_everywhere(self):
    x = np.array([-1e4, -200.0, -60, -20.001, -19.999, -1, 0, 3, 200])
    slope = jax.vmap(jax.grad(lambda x: lib.score(x, 'sqrtsoftplus')))
    sp = np.logaddexp(0, x)
    with np.errstate(all='ignore'):
      want = np.where(x < -600, 0, 1 / (1 + np.exp(-x)) / (2 * np.sqrt(sp)))
    np.testing.assert_allclose(
      slope(jnp.float32(x)), want, rtol=1e-5, atol=1e-30
    )

  def test_weights_by_hand(self):
    scores = jnp.array([0.5, 2.0, 1.0, 1.5])
    cfg = dataclasses.replace(V4, scale=2.5)
    experts, weights = lib.choose(scores, jnp.array([9.0, 0, 0, 0]), 2, cfg)
    self.assertEqual(experts.tolist(), [0, 1])
    np.testing.assert_allclose(weights, [0.5, 2.0], rtol=1e-6)


class TableTest(parameterized.TestCase):
  @parameterized.parameters((64, 8, 3), (50, 7, 7), (1000, 16, 6), (5, 8, 2))
  def test_experts_are_distinct_and_evenly_used(self, vocab, experts, top_k):
    table = lib.hash_table(jax.random.key(1), vocab, experts, top_k)
    self.assertEqual((table.shape, table.dtype), ((vocab, top_k), jnp.int32))
    table = np.asarray(table)
    self.assertTrue(((table >= 0) & (table < experts)).all())
    self.assertTrue(all(len(set(row)) == top_k for row in table.tolist()))
    load = np.bincount(table.reshape(-1), minlength=experts)
    # Only the last, incomplete round of E tokens can be uneven.
    self.assertLessEqual(load.max() - load.min(), top_k)

  def test_layers_get_different_tables(self):
    a, b = router(HASH, 0).table[...], router(HASH, 1).table[...]
    self.assertFalse(np.array_equal(a, b))

  def test_neighbouring_tokens_share_no_pattern(self):
    table = np.asarray(lib.hash_table(jax.random.key(0), 512, 16, 2))
    steps = np.bincount((table[1:, 0] - table[:-1, 0]) % 16, minlength=16)
    self.assertLess(steps.max(), 80)  # 32 of each expected


class HashTest(parameterized.TestCase):
  def test_the_token_chooses_and_its_scores_weigh(self):
    module = router(HASH)
    x, ctx = inputs()
    routing = module(x, ctx)
    table = np.asarray(module.table[...])
    logits = np.float64(x) @ np.float64(module.weight[...])
    scores = np.sqrt(np.logaddexp(0, logits))
    for b in range(2):
      for t in range(5):
        chosen = table[ctx.tokens[b, t]]
        np.testing.assert_array_equal(routing.experts[b, t], chosen)
        want = scores[b, t, chosen]
        np.testing.assert_allclose(
          routing.weights[b, t], 1.5 * want / want.sum(), rtol=1e-5
        )

  def test_the_state_moves_weights_and_never_the_choice(self):
    module = router(HASH)
    x, ctx = inputs()
    a, b = module(x, ctx), module(-x, ctx)
    np.testing.assert_array_equal(a.experts, b.experts)
    self.assertGreater(float(jnp.abs(a.weights - b.weights).max()), 0.1)
    grad = jax.grad(lambda x: module(x, ctx).weights[..., 0].sum())(x)
    self.assertGreater(float(jnp.abs(grad).max()), 0)

  def test_padding_goes_nowhere(self):
    routing = router(HASH)(*inputs(padding=2))
    np.testing.assert_array_equal(routing.experts[1, 3:], 8)
    np.testing.assert_array_equal(routing.weights[1, 3:], 0)
    self.assertLess(int(routing.experts[1, :3].max()), 8)

  def test_a_model_keeps_one_table_per_layer_in_its_buffers(self):
    kinds = {
      'hash': ds.model.transformer_config.Kind(
        'moe',
        (
          ('moe.router.bias', False),
          ('moe.router.hash_vocab', tiny.VOCAB),
        ),
      ),
      **tiny.config('v3').kinds,
    }
    layout = ((('hash',), 2), (('moe',), 1))
    config = dataclasses.replace(
      tiny.config('v3'),
      kinds=kinds,
      layout=layout,
      moe=dataclasses.replace(tiny.V3_MOE, router=RouterConfig()),
    )
    config = ds.from_dict(type(config), ds.to_dict(config))  # survives JSON
    model = ds.build(config)
    buffers = model.init(jax.random.key(0))['buffers']
    table = np.asarray(buffers['segments'][0][0]['ffn']['router']['table'])
    self.assertEqual((table.shape, table.dtype), ((2, 64, 3), np.int32))
    self.assertFalse(np.array_equal(table[0], table[1]))
    count = ds.plan.count_parameters(config)
    biased = dataclasses.replace(config, layout=((('moe',), 3),))
    # No bias in two layers, and the table is no parameter.
    self.assertEqual(ds.plan.count_parameters(biased).total - count.total, 16)

  def test_what_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'router.hash_vocab = 64: must'):
      dataclasses.replace(HASH, bias=True).check(8, 3)
    with self.assertRaisesRegex(ds.InputError, 'router.hash_vocab = -1: must'):
      dataclasses.replace(HASH, hash_vocab=-1).check(8, 3)
    other = dataclasses.replace(
      tiny.V3_MOE, router=dataclasses.replace(HASH, hash_vocab=63)
    )
    with self.assertRaisesRegex(ds.InputError, 'must be vocab_size = 64'):
      dataclasses.replace(tiny.config('v3'), moe=other)


class LimitTest(parameterized.TestCase):
  def test_gate_is_clamped_above_and_up_on_both_sides(self):
    gate_up = jnp.array([[-50.0, 50, 50, 1, 1, 20, -20, 0.5]])
    silu = lambda x: x / (1 + np.exp(-x))
    want = [silu(-50.0) * 1, silu(10) * 10, silu(10) * -10, silu(1) * 0.5]
    got = ffn.swiglu(gate_up, 10.0)
    np.testing.assert_allclose(got[0], want, rtol=1e-6)
    self.assertGreater(float(jnp.abs(ffn.swiglu(gate_up)).max()), 900)

  def test_routed_and_shared_experts_both_clamp(self):
    cfg = dataclasses.replace(tiny.V3_MOE, limit=0.05)
    x, ctx = inputs()
    module = cfg.build(16, std=1.0, rngs=nnx.Rngs(0))
    y, _ = module(x, ctx)
    wide = dataclasses.replace(cfg, limit=None)
    free = wide.build(16, std=1.0, rngs=nnx.Rngs(0))(x, ctx)[0]
    # |silu| <= .05 and |up| <= .05 leave at most F * .0025 * |down| each.
    self.assertLess(float(jnp.abs(y).max()), 0.3 * float(jnp.abs(free).max()))
    args = (
      jnp.tile(x.reshape(10, 16), (4, 1)),
      jnp.tile(jnp.arange(30).reshape(10, 3) % 8, (4, 1)),
      jnp.ones((40, 3)) / 3,
      module.gate_up[...],
      module.down[...],
    )
    grouped = moe.apply_experts(*args, limit=0.05)
    few = moe.apply_experts(*(a[:10] for a in args[:3]), *args[3:], limit=0.05)
    np.testing.assert_allclose(grouped[:10], few, atol=1e-5)

  def test_a_limit_of_0_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, r'limit = 0.0: must be above'):
      dataclasses.replace(tiny.V3_MOE, limit=0.0)


if __name__ == '__main__':
  absltest.main()
