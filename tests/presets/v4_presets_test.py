"""V4's published parameter counts, layer by layer, and its shapes."""

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.model.attention import rope
from deepseek_jax.plan import count_parameters
from deepseek_jax.plan.attention import attention_cost
from experiments.configs import v4_tiny
from tests import tiny


def attention(d, heads, ql, c, g, o, ratio, index=(64, 128)):
  """Parameters of one layer's attention, by the formulas of the report."""
  n = d * ql + ql + ql * heads * c + d * c + c
  n += heads * c // g * g * o + g * o * d + heads
  if ratio == 128:
    n += 2 * d * c + 128 * c + c
  if ratio == 4:
    h, i = index
    n += 2 * d * 2 * c + 4 * 2 * c + c
    n += 2 * d * 2 * i + 4 * 2 * i + i + ql * h * i + d * h
  return n


def moe(d, width, experts, bias=True):
  return 3 * d * width * (experts + 1) + experts * d + experts * bias


def mhc(d):
  return 2 * (24 * 4 * d + 24 + 3)


# d, heads, q_rank, head dim, groups, o_rank; width, experts; ratios by layer.
SHAPES = {
  'v4_flash': (
    (4096, 64, 1024, 512, 8, 1024),
    (2048, 256),
    [0, 0] + [4, 128] * 20 + [4],
  ),
  'v4_pro': (
    (7168, 128, 1536, 512, 16, 1024),
    (3072, 384),
    [128, 128] + [4, 128] * 29 + [4],
  ),
}


def by_formula(name):
  """total, active without embedding, mtp: of the report's formulas."""
  shape, (width, experts), ratios = SHAPES[name]
  d = shape[0]
  head = 4 * 4 * d + 4 + 1
  layers = sum(
    attention(*shape, ratio=r) + moe(d, width, experts, i > 2) + mhc(d) + 2 * d
    for i, r in enumerate(ratios)
  )
  total = layers + 2 * 129280 * d + d + head
  mtp = attention(*shape, ratio=0) + moe(d, width, experts) + mhc(d)
  mtp += 2 * d * d + 3 * d + 2 * d + head
  idle = len(ratios) * 3 * d * width * (experts - 6)
  return total, total - idle - 129280 * d, mtp


def billions(n, digits):
  return round(n / 1e9, digits)


class CountTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES)
  def test_counts_equal_the_formulas_to_the_last_digit(self, name):
    count = count_parameters(getattr(ds.presets, name)())
    self.assertEqual(
      (count.total, count.active_without_embedding, count.mtp),
      by_formula(name),
    )

  def test_counts_are_the_published_ones(self):
    flash = count_parameters(ds.presets.v4_flash())
    pro = count_parameters(ds.presets.v4_pro())
    self.assertEqual(billions(flash.total, 2), 284.33)
    self.assertEqual(billions(flash.total + flash.mtp, 1), 290.9)
    self.assertEqual(billions(flash.active_without_embedding, 2), 13.27)
    self.assertEqual(billions(pro.total, 1), 1573.0)
    self.assertEqual(billions(pro.total + pro.mtp, 2), 1598.84)
    self.assertEqual(billions(pro.active_without_embedding, 2), 48.85)

  @parameterized.parameters(
    ('v4_flash', 5.086, 277.03, 1.08, 0.034, 1.059),
    ('v4_pro', 19.465, 1547.40, 4.03, 0.084, 1.853),
  )
  def test_pieces_are_the_published_ones(self, name, attn, routed, *rest):
    config = getattr(ds.presets, name)()
    shapes = jax.eval_shape(ds.build(config).init, jax.random.key(0))['params']
    blocks = [
      b for segment in shapes['segments'].values() for b in segment.values()
    ]
    size = lambda *keys: sum(tiny.size(b[k]) for b in blocks for k in keys)
    self.assertEqual(billions(size('attention'), 3), attn)
    experts = sum(
      tiny.size([b['ffn']['gate_up'], b['ffn']['down']]) for b in blocks
    )
    self.assertEqual(billions(experts, 2), routed)
    shared = sum(tiny.size(b['ffn']['shared']) for b in blocks)
    self.assertEqual(billions(shared, 2), rest[0])
    streams = size('attention_residual', 'ffn_residual')
    self.assertEqual(billions(streams, 3), rest[1])
    ends = tiny.size([shapes['embed'], shapes['head']])
    self.assertEqual(billions(ends, 3), rest[2])


class ShapeTest(parameterized.TestCase):
  @parameterized.parameters(*SHAPES, 'v4_tiny')
  def test_layers_route_and_attend_as_published(self, name):
    config = getattr(ds.presets, name)()
    config = ds.from_dict(type(config), ds.to_dict(config))
    blocks = [b for s in config.segments() for b in s.blocks * s.repeat]
    ratio = {'none': 0, 'csa': 4, 'hca': 128}
    if name != 'v4_tiny':
      self.assertEqual(
        [ratio[b.attention.compress] for b in blocks], SHAPES[name][2]
      )
      self.assertEqual(
        [b.ffn.router.hash_vocab > 0 for b in blocks],
        [i < 3 for i in range(len(blocks))],
      )
    mtp = config.block(config.mtp.block)
    self.assertEqual(mtp.attention.compress, 'none')
    self.assertTrue(mtp.ffn.router.bias)
    for block in [*blocks, mtp]:
      router = block.ffn.router
      self.assertEqual(router.bias, not router.hash_vocab)
      self.assertEqual(router.scoring, 'sqrtsoftplus')
      self.assertEqual(block.ffn.limit, 10)

  def test_rope_has_two_bases_and_no_mscale(self):
    attention = ds.presets.v4_flash().attention
    self.assertEqual(attention.layer_rope.theta, 10000)
    self.assertIsNone(attention.layer_rope.scaling)
    far = ds.changed(attention, {'compress': 'csa'})
    self.assertEqual(far.layer_rope.theta, 160000)
    self.assertEqual(rope.table_multiplier(far.layer_rope), 1.0)
    plain = 160000.0 ** (-np.arange(0, 64, 2) / 64)
    slowed = plain / rope.frequencies(far.layer_rope, 64)
    # YaRN's ramp runs from channel pair 15 to 25.
    np.testing.assert_allclose(slowed[:16], 1, rtol=1e-9)
    np.testing.assert_allclose(slowed[25:], 16, rtol=1e-9)
    np.testing.assert_allclose(1 / slowed[20], 0.5 / 16 + 0.5, rtol=1e-9)

  @parameterized.parameters(('v4_pro', 0.265), ('v4_flash', 0.100))
  def test_work_per_token_at_a_million_beside_v32(self, name, share):
    """In units of an 8-bit product: 4 bits are half, 16 bits two."""
    n, config = 1 << 20, getattr(ds.presets, name)()
    index = attention = 0
    for segment in config.segments():
      for block in segment.blocks:
        cost = attention_cost(block.attention, config.dim)
        for term in cost.fresh.pairs:
          work = 2 * segment.repeat * term.macs * term.keys(n)
          if term.scores:
            attention += work
          else:
            index += work
    active = count_parameters(config).active_without_embedding
    ours = 2 * active + index / 2 + 2 * attention
    # V3.2: 61 layers, 64 index heads of 128, 2048 latents of 576 and 512.
    v32 = 74e9 + 61 * n * 64 * 128 * 2 + 2 * 61 * 2048 * 128 * 1088 * 2
    self.assertAlmostEqual(ours / v32, share, delta=0.0006)

  def test_bytes_per_token_of_the_cache(self):
    """An entry of 584 bytes and an index key of 68, as released."""
    for name, want in (('v4_flash', 3514.25), ('v4_pro', 5031.4375)):
      blocks = [
        b
        for s in getattr(ds.presets, name)().segments()
        for b in s.blocks * s.repeat
      ]
      cost = {'none': 0.0, 'csa': (584 + 68) / 4, 'hca': 584 / 128}
      total = sum(cost[b.attention.compress] for b in blocks)
      self.assertEqual(total, want)
      values = {'none': 0, 'csa': 640 * 32, 'hca': 512}
      for block in blocks[:5]:
        cache = block.attention.cache
        shapes = [
          jax.eval_shape(lambda n=n, c=cache: c(1, n, np.float32))
          for n in (128, 256)
        ]
        grown = tiny.size(shapes[1]) - tiny.size(shapes[0])
        self.assertEqual(grown, values[block.attention.compress])


class DemoTest(absltest.TestCase):
  def test_documents_are_apart_as_in_v4s_training(self):
    self.assertFalse(v4_tiny.get_config().data.cross_document)


if __name__ == '__main__':
  absltest.main()
