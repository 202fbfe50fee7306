"""Sparse attention, streams, memories: published figures and shapes."""

import dataclasses

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.model.attention.indexer import IndexBlocksConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.plan import device_shares as mesh
from deepseek_jax.plan import flops

MILLION = 1 << 20
V32, PRO, FLASH = (
  getattr(ds.presets, name)() for name in ('v32', 'v4_pro', 'v4_flash')
)
# NSA's 27B model (arXiv:2502.11089, section 4.1).
NSA = NSAConfig(heads=64, kv_heads=4, qk_dim=192, v_dim=128)


def growth(config) -> float:
  """Bytes per further token of a long sequence's 8-bit records."""
  return (
    plan.cache(config, 2 * MILLION).fp8 - plan.cache(config, MILLION).fp8
  ) / MILLION


def giga(config) -> dict[str, float]:
  parts = next(iter(flops.decode_parts(config, MILLION).values()))
  return {name: n / 1e9 for name, n in parts.items()}


def eight_bit(config, index_cost: float) -> float:
  """GFLOPs of a token at a million, as of 8-bit products.

  V4's own count: weights are 8-bit, attention 16-bit and twice as dear;
  V4's indexer has 4 bits and costs half.
  """
  parts = giga(config)
  index = index_cost * parts[flops.INDEX]
  return parts['weights'] + 2 * parts[flops.CORE] + index


class PublishedTest(parameterized.TestCase):
  @parameterized.parameters(
    (V32, 671_877_944_064, 38_403_822_336),
    (FLASH, 284.33e9, None),
    (PRO, 1573.0e9, None),
  )
  def test_parameters(self, config, total, active):
    count = plan.count_parameters(config)
    self.assertAlmostEqual(count.total / total, 1, delta=1e-4)
    if active:
      self.assertEqual((count.total, count.active), (total, active))

  @parameterized.parameters((PRO, 1598.84e9), (FLASH, 290.9e9))
  def test_parameters_with_prediction(self, config, total):
    count = plan.count_parameters(config)
    self.assertAlmostEqual((count.total + count.mtp) / total, 1, delta=2e-4)

  @parameterized.parameters((PRO, 48.85e9), (FLASH, 13.27e9))
  def test_active_parameters_without_embedding(self, config, active):
    count = plan.count_parameters(config)
    got = count.active_without_embedding
    self.assertAlmostEqual(got / active, 1, delta=5e-4)

  def test_cache_bytes_per_token(self):
    self.assertEqual(plan.cache(V32).fp8, 48_068)
    self.assertEqual(plan.cache(V32).elements, 35_136 + 7_808)
    self.assertAlmostEqual(growth(PRO), 5031.4375)
    self.assertAlmostEqual(growth(FLASH), 3514.25)

  @parameterized.parameters((PRO, 0.105, 10), (FLASH, 0.073, 7))
  def test_v4s_share_of_v32s_cache(self, config, share, claim):
    got = plan.cache(config, MILLION).fp8 / plan.cache(V32, MILLION).fp8
    self.assertAlmostEqual(got, share, delta=0.0005)
    self.assertEqual(int(100 * got), claim)

  @parameterized.parameters(
    (V32, 74, 1048, 34.8), (PRO, 98, 128.8, 76.7), (FLASH, 26.6, 90.2, 23.6)
  )
  def test_flops_of_a_token_at_a_million(self, config, weights, index, core):
    got = giga(config)
    self.assertAlmostEqual(got['weights'], weights, delta=1)
    # The largest printed digit; the indexers' are a million by 2^20 / 1e6.
    self.assertAlmostEqual(got[flops.INDEX] / index, 1, delta=2e-3)
    self.assertAlmostEqual(got[flops.CORE] / core, 1, delta=3e-3)

  @parameterized.parameters((PRO, 0.2646, 0.27), (FLASH, 0.0997, 0.1))
  def test_v4s_share_of_v32s_flops(self, config, share, claim):
    got = eight_bit(config, 0.5) / eight_bit(V32, 1)
    self.assertAlmostEqual(got, share, delta=1e-4)
    self.assertAlmostEqual(got, claim, delta=0.006)

  def test_in_blocks_the_index_is_of_means_and_candidates(self):
    blocks = IndexBlocksConfig(128, 64)
    config = ds.changed(V32, {'attention.indexer.blocks': blocks})
    share = giga(config)[flops.INDEX] / giga(V32)[flops.INDEX]
    self.assertAlmostEqual(share, 1 / 128 + 64 * 128 / MILLION, delta=1e-6)
    # A mean of bfloat16 for every 128 tokens, as a cache in float8 has it.
    self.assertEqual(growth(config), growth(V32) + 61 * 256 / 128)

  @parameterized.parameters(
    (8192, 2048, 4.0),
    (16384, 2560, 6.4),
    (32768, 3584, 9.1),
    (65536, 5632, 11.6),
  )
  def test_what_nsa_reads(self, length, tokens, saving):
    form = plan.attention_cost(NSA, 2560).cached['cached']
    got = sum(term.keys(length) for term in form.pairs)
    self.assertEqual(got, tokens)
    self.assertEqual(round(length / got, 1), saving)


class ShapesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v32_tiny', ()),
    ('nsa_tiny', ('place',)),
    ('v4_tiny', ('ape', 'sink')),
  )
  def test_weights_are_those_of_the_model(self, name, tables):
    """Every matrix of the attention multiplies; tables that add do not."""
    config = getattr(ds.presets, name)()
    held = mesh.shares(config, plan.Mesh())
    layers = [b for s in config.segments() for b in s.blocks * s.repeat]
    for number, block in enumerate(layers):
      found = {
        s.name: s.whole
        for s in held[('block', number)]
        if '.attention.' in s.name
        and (s.matrix or s.name.endswith('indexer.weights'))
      }
      matrices = sum(
        n for path, n in found.items() if path.split('.')[-1] not in tables
      )
      cost = plan.attention_cost(block.attention, config.dim)
      self.assertEqual(cost.weights, matrices, found)

  def test_streams_and_memories_multiply_by_their_weights(self):
    config = ds.presets.engram_tiny()
    held = mesh.shares(config, plan.Mesh())
    blocks = [b for s in config.segments() for b in s.blocks * s.repeat]
    number = next(i for i, b in enumerate(blocks) if b.engram)
    block, D = blocks[number], config.dim
    sizes = {s.name.split('.', 3)[-1]: s.whole for s in held['block', number]}
    products = sum(
      n
      for path, n in sizes.items()
      if path in ('engram.key', 'engram.value', 'engram.conv')
    )
    gates = block.streams * D
    self.assertEqual(flops.memory_macs(block, D), products + gates)
    streams = ds.presets.v4_tiny()
    n, D = streams.residual.streams, streams.dim
    fn = sum(
      s.whole
      for s in mesh.shares(streams, plan.Mesh())['block', 0]
      if s.name.endswith('attention_residual.fn')
    )
    sublayer, _ = flops.residual_macs(streams.residual, D)
    self.assertEqual(sublayer, fn + (n * n + 2 * n) * D)

  def test_a_sparse_layer_costs_less_than_the_dense_one_of_long_text(self):
    dense = dataclasses.replace(V32, attention=ds.presets.v3().attention)
    short, long = 2048, MILLION
    of = lambda config, n: sum(giga_at(config, n).values())
    self.assertGreater(of(V32, short), of(dense, short))
    self.assertLess(of(V32, long), of(dense, long) / 4)

  @parameterized.parameters('v32_tiny', 'nsa_tiny', 'v4_tiny', 'engram_tiny')
  def test_whole_plans(self, name):
    config = getattr(ds.presets, name)()
    recipe = plan.Recipe(batch=4, training=plan.Training(64))
    report = plan.estimate(config, recipe=recipe)
    self.assertGreater(report.memory['none']['activations'], 0)
    full = report.memory['full']['activations']
    self.assertLess(full, report.memory['none']['activations'])
    parts = report.flops['half'].forward
    self.assertEqual(flops.INDEX in parts, name in ('v32_tiny', 'v4_tiny'))
    self.assertEqual(flops.MEMORY in parts, name == 'engram_tiny')
    self.assertNotEmpty(report.decode)

  def test_the_dense_stage_of_v4_pairs_queries_with_all_entries(self):
    flash, n = ds.presets.v4_flash(), 8192
    dense = ds.changed(flash, {'attention.csa.stage': 'dense'})
    parts = lambda config: flops.decode_parts(config, n)['cached']
    more, less = parts(dense), parts(flash)
    self.assertEqual(more[flops.INDEX], less[flops.INDEX])
    pairs = n // 4 - 512  # entries beyond the picked ones, a query
    heads = 2 * 2 * 64 * 512
    self.assertEqual(
      sum(more.values()) - sum(less.values()), 21 * pairs * heads
    )

  def test_choosing_has_no_backward_pass(self):
    count = plan.count_flops(V32, 4096, seen='triangle')
    index = count.forward[flops.INDEX]
    pairs = 4096 * 4097 // 2
    self.assertEqual(index, 61 * 2 * 64 * 128 * pairs)
    others = sum(count.forward.values()) - index
    self.assertEqual(count.training, 3 * others + index)


def giga_at(config, length):
  return flops.decode_parts(config, length)['absorbed']


if __name__ == '__main__':
  absltest.main()
