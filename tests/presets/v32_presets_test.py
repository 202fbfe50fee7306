"""Published numbers of V3.2, and its tiny twins."""

import jax
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.plan import count_parameters
from tests import tiny


class V32Test(absltest.TestCase):
  def test_parameter_counts(self):
    count = count_parameters(ds.presets.v32())
    ends = count.embedding + count.head
    self.assertEqual(
      (
        count.total,
        count.total - ends,
        count.active,
        count.active_without_embedding,
        count.active - ends,
      ),
      (
        671_877_944_064,
        670_024_585_984,
        38_403_822_336,
        37_477_143_296,
        36_550_464_256,
      ),
    )

  def test_an_indexer_has_its_published_size(self):
    abstract = ds.build(ds.presets.v32()).abstract['params']
    layers = abstract['segments'][1][0]['attention']['indexer']
    self.assertEqual(tiny.size(layers), 58 * 13_959_424)

  def test_it_is_v3_but_for_the_indexer(self):
    v3, v32 = ds.presets.v3(), ds.presets.v32()
    a = v32.attention
    self.assertIsInstance(a, DSAConfig)
    self.assertEqual((a.indexer.heads, a.indexer.dim, a.top_k), (64, 128, 2048))
    self.assertFalse(a.indexer.interleaved)
    self.assertTrue(a.rope.interleaved)
    self.assertEqual(a.scale, v3.attention.scale)
    self.assertEqual(
      (v32.moe, v32.layout, v32.mtp), (v3.moe, v3.layout, v3.mtp)
    )

  def test_elements_cached_of_a_token(self):
    model = ds.build(ds.presets.v32())
    cache = jax.eval_shape(lambda: model.init_cache(1, 1))
    self.assertEqual(tiny.size(cache.layers), 35_136 + 7_808)


class TinyTest(parameterized.TestCase):
  @parameterized.parameters(('v32_tiny', DSAConfig), ('nsa_tiny', NSAConfig))
  def test_twins_choose_among_256_tokens(self, name, kind):
    cfg = getattr(ds.presets, name)()
    self.assertIsInstance(cfg.attention, kind)
    self.assertLess(count_parameters(cfg).total, 10_000_000)
    self.assertEqual(cfg.moe, ds.presets.v3_tiny().moe)

  def test_a_run_of_v3_tiny_fits_v32_tiny(self):
    """All arrays of the one are in the other, which adds just indexers."""
    names = lambda cfg: {
      jax.tree_util.keystr(path, simple=True): leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(ds.build(cfg).init, jax.random.key(0))
      )
    }
    dense = names(ds.presets.v3_tiny())
    sparse = names(ds.presets.v32_tiny())
    self.assertEqual(dense, {k: sparse[k] for k in dense})
    self.assertTrue(all('indexer' in k for k in set(sparse) - set(dense)))


if __name__ == '__main__':
  absltest.main()
