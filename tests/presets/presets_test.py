"""Every published number of the presets: parameters, shapes, cache sizes."""

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention.rope import Llama3Config, YarnConfig
from deepseek_jax.plan import count_parameters
from tests import tiny

# total; without embedding and head; active with both, head only, neither.
COUNTS = {
  'moe_16b': (
    16_375_728_128,
    15_956_297_728,
    2_828_650_496,
    2_618_935_296,
    2_409_220_096,
  ),
  'v2_lite': (
    15_706_484_224,
    15_287_053_824,
    2_661_150_208,
    2_451_435_008,
    2_241_719_808,
  ),
  'v2': (
    235_741_434_880,
    234_692_858_880,
    21_375_800_320,
    20_851_512_320,
    20_327_224_320,
  ),
  'v3': (
    671_026_419_200,
    669_173_061_120,
    37_552_297_472,
    36_625_618_432,
    35_698_939_392,
  ),
}
LLAMA = {
  'llama31_8b': (8_030_261_248, 6_979_588_096),
  'llama31_70b': (70_553_706_496, 68_452_360_192),
  'llama31_405b': (405_853_388_800, 401_650_696_192),
}
# layers, width, heads, dense layers, dense width, expert width, E S K, V.
SHAPES = {
  'moe_16b': (28, 2048, 16, 1, 10944, 1408, (64, 2, 6), 102400),
  'v2_lite': (27, 2048, 16, 1, 10944, 1408, (64, 2, 6), 102400),
  'v2': (60, 5120, 128, 1, 12288, 1536, (160, 2, 6), 102400),
  'v3': (61, 7168, 128, 3, 18432, 2048, (256, 1, 8), 129280),
}
# scoring, bias, normalised, scale, groups, kept groups, group score.
ROUTERS = {
  'moe_16b': ('softmax', False, False, 1.0, 1, 1),
  'v2_lite': ('softmax', False, False, 1.0, 1, 1),
  'v2': ('softmax', False, False, 16.0, 8, 3),
  'v3': ('sigmoid', True, True, 2.5, 8, 4),
}


class ParameterCountTest(parameterized.TestCase):
  @parameterized.parameters(*COUNTS)
  def test_deepseek_models_have_the_published_numbers(self, name):
    count = count_parameters(getattr(ds.presets, name)())
    ends = count.embedding + count.head
    self.assertEqual(
      (
        count.total,
        count.total - ends,
        count.active,
        count.active_without_embedding,
        count.active - ends,
      ),
      COUNTS[name],
    )

  @parameterized.parameters(*LLAMA)
  def test_llama_models_have_the_published_numbers(self, name):
    count = count_parameters(getattr(ds.presets, name)())
    ends = count.embedding + count.head
    self.assertEqual((count.total, count.total - ends), LLAMA[name])
    self.assertEqual(count.active, count.total)
    self.assertEqual((count.mtp, count.mtp_active), (0, 0))

  def test_v3_prediction_module(self):
    count = count_parameters(ds.presets.v3())
    self.assertEqual(count.mtp, 11_610_068_224)
    self.assertEqual(count.mtp_active, 688_100_608)
    shared = count.embedding + count.head
    self.assertEqual(count.mtp_active + shared, 2_541_458_688)
    self.assertEqual(count.total + count.mtp, 682_636_487_424)
    # README_WEIGHTS of the release leaves the merging matrix out.
    merge = 2 * 7168**2
    self.assertEqual(count.mtp - merge, 11_507_307_776)
    self.assertEqual(count.mtp_active + shared - merge, 2_438_698_240)

  def test_pieces_of_v3(self):
    model = ds.build(ds.presets.v3())
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    dense, moe = (shapes['params']['segments'][i][0] for i in (0, 1))
    self.assertEqual(tiny.size(moe['attention']), 58 * 187_107_328)
    experts = tiny.size([moe['ffn']['gate_up'], moe['ffn']['down']])
    self.assertEqual(experts, 58 * 256 * 44_040_192)
    biases = shapes['buffers']['segments'][1][0]['ffn']
    self.assertEqual(tiny.size(biases), 58 * 256)
    self.assertEqual(tiny.size([moe['ffn'], biases]), 58 * 11_320_164_608)
    self.assertEqual(tiny.size(dense['ffn']), 3 * 396_361_728)
    self.assertEqual(tiny.size(shapes['params']['embed']), 926_679_040)
    self.assertEqual(tiny.size(shapes['buffers']), 59 * 256)

  def test_a_tied_head_counts_once(self):
    count = count_parameters(tiny.config('mixed'))
    variables = tiny.variables('mixed')
    self.assertEqual(count.head, 0)
    self.assertEqual(count.total + count.mtp, tiny.size(variables))


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES)
  def test_deepseek_shapes(self, name):
    cfg = getattr(ds.presets, name)()
    dense = sum(s.repeat for s in cfg.segments() if s.blocks[0].ffn == cfg.ffn)
    m, r = cfg.moe, cfg.moe.router
    self.assertEqual(
      (
        cfg.layers,
        cfg.dim,
        cfg.attention.heads,
        dense,
        cfg.ffn.width,
        m.width,
        (m.experts, m.shared, m.top_k),
        cfg.vocab_size,
      ),
      SHAPES[name],
    )
    got = (r.scoring, r.bias, r.normalize, r.scale, r.groups, r.top_groups)
    self.assertEqual(got, ROUTERS[name])
    self.assertEqual(cfg.norm_eps, 1e-6)
    self.assertEqual(cfg.init_std, 0.006)
    self.assertFalse(cfg.tied)
    self.assertEqual(cfg.mtp.depth, int(name == 'v3'))

  @parameterized.parameters(
    ('v2_lite', None, 0.707), ('v2', 1536, 0.707), ('v3', 1536, 1.0)
  )
  def test_latent_attention(self, name, q_rank, mscale):
    a = getattr(ds.presets, name)().attention
    self.assertEqual(
      (a.q_rank, a.kv_rank, a.nope_dim, a.rope_dim, a.v_dim),
      (q_rank, 512, 128, 64, 128),
    )
    self.assertEqual(a.norm_eps, 1e-6)
    self.assertTrue(a.rope.interleaved)
    self.assertEqual(a.rope.theta, 10000.0)
    self.assertEqual(
      a.rope.scaling, YarnConfig(40.0, 4096, 32.0, 1.0, mscale, mscale)
    )

  def test_v2_groups_count_by_their_best_and_v3_by_their_best_two(self):
    self.assertEqual(ds.presets.v2().moe.router.group_score, 'max')
    self.assertEqual(ds.presets.v3().moe.router.group_score, 'top2')

  def test_balance_losses_of_the_papers(self):
    lite, v2, v3 = (
      getattr(ds.presets, n)().moe.balance for n in ('v2_lite', 'v2', 'v3')
    )
    self.assertEqual(
      (lite.expert, lite.device, lite.communication), (0.001, 0, 0)
    )
    self.assertEqual(
      (v2.expert, v2.device, v2.communication), (0.003, 0.05, 0.02)
    )
    self.assertEqual((v2.devices, v2.device_limit), (8, 3))
    self.assertEqual((v3.sequence, v3.expert), (1e-4, 0))

  @parameterized.parameters(*LLAMA)
  def test_llama_rope_and_norm(self, name):
    cfg = getattr(ds.presets, name)()
    self.assertEqual(cfg.norm_eps, 1e-5)
    self.assertFalse(cfg.attention.rope.interleaved)
    self.assertEqual(cfg.attention.rope.theta, 500000.0)
    self.assertEqual(
      cfg.attention.rope.scaling, Llama3Config(8.0, 1.0, 4.0, 8192)
    )
    self.assertEqual(cfg.attention.kv_heads, 8)

  def test_the_tiny_twin_has_every_idea_of_v3(self):
    cfg = ds.presets.v3_tiny()
    self.assertLess(count_parameters(cfg).total, 10_000_000)
    self.assertGreater(cfg.moe.router.groups, cfg.moe.router.top_groups)
    self.assertTrue(cfg.moe.router.bias)
    self.assertTrue(cfg.moe.balance.sequence)
    self.assertEqual(cfg.mtp.depth, 1)
    self.assertIsNotNone(cfg.attention.q_rank)


class CacheTest(parameterized.TestCase):
  @parameterized.parameters(
    ('moe_16b', 114_688),
    ('v2_lite', 15_552),
    ('v2', 34_560),
    ('v3', 35_136),
    ('llama31_8b', 65_536),
    ('llama31_70b', 163_840),
    ('llama31_405b', 258_048),
  )
  def test_elements_per_token(self, name, want):
    model = ds.build(getattr(ds.presets, name)())
    cache = jax.eval_shape(lambda: model.init_cache(2, 3))
    self.assertEqual(tiny.size(cache.layers), 2 * 3 * want)
    self.assertEqual(cache.length.dtype, jnp.int32)


if __name__ == '__main__':
  absltest.main()
