import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention import rope as lib
from deepseek_jax.model.attention.rope import (
  LinearConfig,
  Llama3Config,
  RopeConfig,
  YarnConfig,
)
from tests import reference

YARN = RopeConfig(scaling=YarnConfig())
LLAMA = RopeConfig(theta=500000.0, interleaved=False, scaling=Llama3Config())


class FrequenciesTest(parameterized.TestCase):
  def test_yarn_equals_the_published_vector(self):
    got = lib.frequencies(YARN, 64)
    self.assertLen(got, 32)
    want = {
      0: 1.0,
      9: 0.0749894209,
      10: 0.0562341325,
      11: 0.0390069266,
      16: 0.0055,
      22: 0.0001778279,
      23: 0.000033338,
      31: 0.0000033338,
    }
    for i, value in want.items():
      # The vector is printed to 10 decimals.
      self.assertAlmostEqual(got[i], value, delta=6e-11, msg=i)

  @parameterized.parameters(
    (YARN, 64),
    (dataclasses.replace(YARN, theta=500.0), 16),
    (RopeConfig(scaling=YarnConfig(factor=4, original_length=16)), 4),
    (RopeConfig(scaling=YarnConfig(beta_fast=8, beta_slow=8)), 32),
    (LLAMA, 128),
    (RopeConfig(theta=100.0, scaling=Llama3Config(original_length=32)), 16),
    (RopeConfig(theta=1e5, scaling=LinearConfig(4.0)), 32),
    (RopeConfig(), 64),
  )
  def test_equals_a_loop_over_pairs(self, cfg, dim):
    got = lib.frequencies(cfg, dim)
    np.testing.assert_allclose(got, reference.frequencies(cfg, dim), rtol=1e-12)

  def test_llama3_has_all_three_regimes(self):
    ratio = lib.frequencies(LLAMA, 128) / lib.frequencies(
      dataclasses.replace(LLAMA, scaling=None), 128
    )
    self.assertEqual(ratio[0], 1)
    self.assertAlmostEqual(ratio[-1], 1 / 8)
    self.assertTrue(((ratio > 0.2) & (ratio < 0.9)).any())

  @parameterized.parameters(0, -4.0, math.nan, math.inf)
  def test_linear_factor_must_be_a_number_above_0(self, factor):
    with self.assertRaisesRegex(ds.InputError, 'scaling.factor'):
      LinearConfig(factor)

  def test_odd_dims_are_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'rope_dim = 7: must be even'):
      lib.frequencies(RopeConfig(), 7)

  def test_theta_at_most_1_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, r'rope\.theta = 1'):
      RopeConfig(theta=1.0)


class ScaleTest(parameterized.TestCase):
  @parameterized.parameters((1.0, 1.3688879454), (0.707, 1.2608037774))
  def test_mscale_equals_the_published_values(self, weight, want):
    self.assertAlmostEqual(lib.mscale(40.0, weight), want, places=10)

  def test_mscale_is_1_without_extension(self):
    self.assertEqual(lib.mscale(1.0, 1.0), 1.0)
    self.assertEqual(lib.mscale(0.5, 1.0), 1.0)

  @parameterized.parameters(
    ('v3', 0.1352337789), ('v2', 0.1147213868), ('v2_lite', 0.1147213868)
  )
  def test_softmax_scale_of_released_models(self, name, want):
    attention = getattr(ds.presets, name)().attention
    self.assertAlmostEqual(attention.scale, want, places=10)
    # All of it goes to the softmax, nothing into cos and sin.
    self.assertEqual(lib.table_multiplier(attention.rope), 1.0)

  def test_softmax_scale_without_yarn_is_the_plain_one(self):
    attention = dataclasses.replace(
      ds.presets.v3().attention, rope=RopeConfig()
    )
    self.assertAlmostEqual(attention.scale, 0.0721687836, places=10)
    llama = ds.presets.llama31_8b().attention
    self.assertEqual(llama.scale, 128**-0.5)

  @parameterized.parameters(
    ({'mscale': None, 'mscale_all_dim': None}, 0.1 * math.log(40) + 1, 1),
    ({'mscale': 1.0, 'mscale_all_dim': None}, 0.1 * math.log(40) + 1, 1),
    (
      {'mscale': 0.707, 'mscale_all_dim': 1.0},
      (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1),
      (0.1 * math.log(40) + 1) ** 2,
    ),
    ({'attention_factor': 1.5}, 1.5, (0.1 * math.log(40) + 1) ** 2),
  )
  def test_absent_mscales_go_to_cos_and_sin(self, fields, table, softmax):
    cfg = RopeConfig(scaling=YarnConfig(**fields))
    self.assertAlmostEqual(lib.table_multiplier(cfg), table, places=12)
    self.assertAlmostEqual(lib.softmax_multiplier(cfg), softmax, places=12)
    x = jnp.ones((1, 2, 8))
    plain = RopeConfig(scaling=YarnConfig())
    got = lib.rope(x, jnp.array([[0, 3]]), cfg)
    want = lib.rope(x, jnp.array([[0, 3]]), plain) * table
    np.testing.assert_allclose(got, want, rtol=1e-6)


class RopeTest(parameterized.TestCase):
  @parameterized.product(
    cfg=(
      RopeConfig(),
      RopeConfig(interleaved=False),
      YARN,
      dataclasses.replace(LLAMA, theta=100.0),
    ),
    heads=(True, False),
  )
  def test_equals_complex_rotation_in_float64(self, cfg, heads):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 8) if heads else (2, 5, 8))
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 100, 9]])
    got = lib.rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), cfg)
    for row in range(2):
      want = reference.rope(np.float32(x[row]), positions[row], cfg)
      # Angles up to 100 are float32 and carry 6e-6 of error themselves.
      np.testing.assert_allclose(got[row], want, atol=1.5e-5)

  def test_interleaved_is_the_half_layout_permuted(self):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 8)))
    positions = jnp.arange(4)[None]
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])
    pairs = lib.rope(x, positions, RopeConfig())
    halves = lib.rope(x[..., order], positions, RopeConfig(interleaved=False))
    np.testing.assert_array_equal(pairs[..., order], halves)
    self.assertGreater(float(jnp.abs(pairs - x).max()), 0.1)

  @parameterized.parameters(True, False)
  def test_scores_depend_on_the_distance_alone(self, interleaved):
    cfg = RopeConfig(interleaved=interleaved)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 8))) for _ in 'qk')
    at = lambda x, p: lib.rope(x, jnp.array([[p]]), cfg)
    near = float((at(q, 5) * at(k, 2)).sum())
    far = float((at(q, 45) * at(k, 42)).sum())
    self.assertAlmostEqual(near, far, delta=1e-4)
    self.assertNotAlmostEqual(near, float((at(q, 5) * at(k, 3)).sum()), 2)

  def test_bfloat16_is_turned_in_float32(self):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8)))
    x = x.astype(jnp.bfloat16)
    positions = jnp.array([[3, 1000, 4095]])
    got = lib.rope(x, positions, RopeConfig())
    self.assertEqual(got.dtype, jnp.bfloat16)
    want = lib.rope(x.astype(jnp.float32), positions, RopeConfig())
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


if __name__ == '__main__':
  absltest.main()
