"""The planner gives the published numbers, each by its own convention.

Sources: DeepSeekMoE arXiv:2401.06066 (tables 3 and 6), V2 arXiv:2405.04434,
V3 arXiv:2412.19437 (table 1), Insights into DeepSeek-V3 arXiv:2505.09343
(tables 1, 2 and 4), R1 arXiv:2501.12948v2, Llama 3.1's model card.
"""

import dataclasses
import functools

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.plan import attention, cost, flops


def dense(layers, dim, heads, kv_heads, width, vocab) -> ds.TransformerConfig:
  return ds.TransformerConfig(
    vocab_size=vocab,
    dim=dim,
    layout=((('dense',), layers),),
    attention=GQAConfig(heads, kv_heads, 128),
    ffn=FFNConfig(width),
  )


DEEPSEEK_7B = dense(30, 4096, 32, 32, 11008, 102400)
DEEPSEEK_67B = dense(95, 8192, 64, 8, 22016, 102400)
QWEN_72B = dense(80, 8192, 64, 8, 29568, 152064)


@functools.cache
def preset(name: str) -> ds.TransformerConfig:
  return getattr(ds.presets, name)()


def gigaflops(name: str, seen: str) -> float:
  return plan.count_flops(preset(name), 4096, seen=seen).per_token / 1e9


class ParametersTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v3', 671, 37), ('v2', 236, 21), ('llama31_405b', 406, 406)
  )
  def test_whole_billions(self, name, total, active):
    count = plan.count_parameters(preset(name))
    self.assertEqual(round(count.total / 1e9), total)
    self.assertIn(active, (count.active // 10**9, round(count.active / 1e9)))

  @parameterized.parameters(
    ('v2_lite', 15.7, 2.451, 'active_without_embedding'),
    ('moe_16b', 16.4, 2.829, 'active'),
    ('v3', 671.0, 37.552, 'active'),
    ('v2', 235.7, 21.376, 'active'),
  )
  def test_active_by_the_papers_convention(self, name, total, active, field):
    count = plan.count_parameters(preset(name))
    self.assertEqual(round(count.total / 1e9, 1), total)
    self.assertEqual(round(getattr(count, field) / 1e9, 3), active)

  def test_the_files_of_v3_hold_685_billion(self):
    count = plan.count_parameters(preset('v3'))
    files = count.total + count.mtp + count.embedding + count.head
    self.assertEqual(files, 684_489_845_504)
    self.assertEqual(count.mtp + count.embedding + count.head, 13_463_426_304)

  def test_prediction_module_sizes(self):
    count = plan.count_parameters(preset('v3'))
    shared, merge = count.embedding + count.head, 2 * 7168**2
    billions = [
      round(n / 1e9, 3)
      for n in (
        count.mtp,
        count.mtp_active + shared,
        count.mtp - merge,
        count.mtp_active + shared - merge,
      )
    ]
    self.assertEqual(billions, [11.610, 2.541, 11.507, 2.439])

  @parameterized.parameters(
    (DEEPSEEK_7B, 6.9), (DEEPSEEK_67B, 67.4), (QWEN_72B, 72.7)
  )
  def test_dense_models_of_the_comparisons(self, config, billions):
    count = plan.count_parameters(config)
    self.assertEqual(round(count.total / 1e9, 1), billions)


class FlopsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v2', 'half', 155.30),
    ('v2', 'full', 185.50),
    ('v3', 'half', 250.45),
    ('v3', 'full', 281.15),
  )
  def test_matmuls_and_attention(self, name, seen, want):
    self.assertEqual(round(gigaflops(name, seen), 2), want)

  def test_matmul_weights_of_v3(self):
    weights = plan.matmul_weights(preset('v3'))
    self.assertEqual(weights, 36_624_596_992)
    self.assertEqual(round(6 * weights / 1e9, 2), 219.75)

  @parameterized.parameters(
    ((QWEN_72B, None), 394.0), ((preset('llama31_405b'), None), 2447.9)
  )
  def test_dense_rule_without_attention(self, args, want):
    config, length = args
    got = plan.standard_flops(
      config.layers, config.dim, config.vocab_size, length
    )
    self.assertEqual(round(got / 1e9, 1), want)

  @parameterized.parameters(
    (DEEPSEEK_7B, 1.0, 183.48),
    (DEEPSEEK_67B, 1.0, 2057.46),
    (preset('moe_16b'), 8 / 4, 74.42),
  )
  def test_dense_rule_with_attention_per_4k_tokens(self, config, units, want):
    got = plan.standard_flops(
      config.layers, config.dim, config.vocab_size, 4096, ffn_units=units
    )
    self.assertEqual(round(got * 4096 / 1e12, 2), want)

  def test_the_dense_rule_is_exact_for_a_model_of_its_shape(self):
    d = 384
    config = dense(3, d, d // 128, d // 128, 8 * d // 3, 512)
    rule = plan.standard_flops(3, d, 512, 256)
    count = plan.count_flops(config, 256, seen='full')
    self.assertEqual(count.per_token, rule)

  def test_llama_405b_training(self):
    # 15.6T tokens by the paper; the published 3.8e25 is 6 N D.
    six = 6 * plan.count_parameters(preset('llama31_405b')).total * 15.6e12
    self.assertEqual(f'{six:.1e}', '3.8e+25')

  def test_absorbed_and_expanded_pairs_of_v3(self):
    forms = plan.attention_cost(preset('v3').attention, 7168).cached
    per_head = {n: 2 * f.pairs[0].macs // 128 for n, f in forms.items()}
    self.assertEqual(per_head, {'absorbed': 2176, 'expanded': 640})

  def test_absorbing_pays_in_decoding_and_not_in_prefill(self):
    config = preset('v3')
    one = plan.decode_flops(config, 32768, 1)
    many = plan.decode_flops(config, 32768, 4096)
    self.assertLess(one['absorbed'], one['expanded'] / 10)
    self.assertLess(many['expanded'], many['absorbed'])

  @parameterized.product(stride=(1, 3, 4), most=(None, 1, 5, 9))
  def test_triangles_equal_the_sum_over_queries(self, stride, most):
    term = plan.Term(1, stride=stride, most=most)
    for length in range(1, 60):
      want = sum(term.keys(t) for t in range(1, length + 1))
      self.assertEqual(term.triangle(length), want)

  def test_an_attention_answers_for_itself(self):
    @dataclasses.dataclass(frozen=True)
    class Mixer:
      def cost(self, dim):
        return plan.AttentionCost(dim, plan.Form(dim, 0, ()), {})

    self.assertEqual(plan.attention_cost(Mixer(), 8).weights, 8)
    with self.assertRaisesRegex(ds.InputError, 'cost'):
      plan.attention_cost(object(), 8)

  @parameterized.parameters(
    ({'seen': 'most'}, 'seen'), ({'remat': 'some'}, 'remat')
  )
  def test_unknown_conventions_are_named(self, wrong, field):
    with self.assertRaisesRegex(ds.InputError, field):
      plan.count_flops(preset('v3'), 8, **wrong)

  def test_multi_token_prediction_of_v3(self):
    config, count = preset('v3'), plan.count_parameters(preset('v3'))
    length = 4096
    forward = plan.count_flops(config, length, mtp=True).forward
    # Active parameters but norms and router bias, the head, and the core.
    vectors = 5 * 7168 + 1536 + 512 + 256
    weights = count.mtp_active - vectors + count.head
    core = 128 * (192 + 128) * length**2
    self.assertEqual(forward[flops.MTP], 2 * length * weights + core)

  def test_what_is_computed_again(self):
    config = preset('v3')
    counts = {
      p: plan.count_flops(config, 4096, remat=p)
      for p in ('none', 'dots', 'full')
    }
    forward = counts['none'].forward
    scores = 61 * 128 * 192 * 4096**2  # half of the square, two FLOPs
    self.assertEqual(counts['none'].repeated, {flops.CORE: scores})
    dots = forward[flops.CORE] + forward[flops.ROUTED] + scores
    self.assertEqual(sum(counts['dots'].repeated.values()), dots)
    layers = sum(forward.values()) - forward[flops.HEAD]
    layers -= (forward[flops.DENSE] + forward[flops.SHARED]) // 3
    self.assertEqual(sum(counts['full'].repeated.values()), layers + scores)


class CacheTest(parameterized.TestCase):
  @parameterized.parameters(
    ('moe_16b', 114_688, None),
    ('v2_lite', 15_552, 27 * 656),
    ('v2', 34_560, 60 * 656),
    ('v3', 35_136, 40_016),
    ('llama31_8b', 65_536, None),
    ('llama31_70b', 163_840, None),
    ('llama31_405b', 258_048, None),
  )
  def test_per_token(self, name, elements, fp8):
    got = plan.cache(preset(name))
    self.assertEqual(
      (got.elements, got.bf16, got.fp8), (elements, 2 * elements, fp8)
    )
    long = plan.cache(preset(name), 1000)
    self.assertEqual(long.bf16, 2000 * elements)

  def test_a_flashmla_record(self):
    record = attention.cache_bytes_fp8(preset('v3').attention, 1)
    self.assertEqual(record, 656)

  def test_table_of_insights(self):
    ours, qwen, llama = (
      plan.cache(c).bf16 / 1000
      for c in (preset('v3'), QWEN_72B, preset('llama31_405b'))
    )
    self.assertEqual((ours, qwen, llama), (70.272, 327.680, 516.096))
    self.assertEqual(round(qwen / ours, 2), 4.66)
    # The table prints 7.28x for this; its own figures give 7.34.
    self.assertEqual(round(llama / ours, 3), 7.344)

  def test_v2_against_67b(self):
    ours, theirs = plan.cache(preset('v2')), plan.cache(DEEPSEEK_67B)
    self.assertEqual(round(1 - ours.bf16 / theirs.bf16, 3), 0.822)
    six_bits = cost.saved(ours.quantized(6), theirs.bf16)
    self.assertEqual(round(six_bits, 5), 0.93339)

  def test_v2_table_9(self):
    # The small model has V2-Lite's shape, MHA 16 heads of 128.
    mha = 27 * attention.cache_elements(GQAConfig(16, 16, 128), 1)
    small, large = (
      plan.cache(preset(n)).elements / 1e3 for n in ('v2_lite', 'v2')
    )
    self.assertEqual(
      (round(mha / 1e3, 1), round(small, 1), round(large, 1)),
      (110.6, 15.6, 34.6),
    )
    self.assertEqual(round(1e3 * small / mha, 2), 0.14)
    self.assertEqual(round(large / 860.2, 2), 0.04)


class CostTest(parameterized.TestCase):
  # 2048 H800, a step of 15360 sequences of 4096 in 19.926 s.
  STEP = (15360 * 4096, 19.926)

  def test_tokens_per_day_and_hours_per_trillion(self):
    daily = cost.tokens_per_day(*self.STEP)
    self.assertEqual(round(daily / 1e9, 1), 272.8)
    hours = cost.device_hours(1e12, 2048, daily)
    self.assertEqual(round(hours / 1e3, 1), 180.2)
    self.assertEqual(round(1e12 / daily, 1), 3.7)

  @parameterized.parameters(('half', 386, 38.94), ('full', 433, 43.73))
  def test_achieved_flops(self, seen, tera, mfu):
    flop = gigaflops('v3', seen) * 1e9
    got = cost.achieved(flop, *self.STEP, 2048)
    self.assertEqual(round(got / 1e12), tera)
    # The paper prints 385 and 432 TFLOPS.
    peak = plan.ACCELERATORS['h800'].bf16.value
    self.assertAlmostEqual(100 * got / peak, mfu, delta=0.12)

  def test_v3_table_1(self):
    per_trillion = 180e3
    hours = {'pre': 14.8 * per_trillion, 'long': 119e3, 'post': 5e3}
    self.assertEqual(hours['pre'], 2664e3)
    total, dollars = cost.bill(hours, 2)
    self.assertEqual((total, dollars), (2788e3, 5.576e6))
    parts = {k: cost.bill({k: h}, 2)[1] for k, h in hours.items()}
    self.assertEqual(parts, {'pre': 5.328e6, 'long': 0.238e6, 'post': 0.01e6})

  def test_the_planned_run_of_v3_costs_what_it_did(self):
    report = v3_report()
    self.assertAlmostEqual(report.time.planned, 19.926, delta=0.1)
    self.assertAlmostEqual(report.cost.device_hours / 2664e3, 1, delta=0.01)
    self.assertAlmostEqual(report.cost.dollars / 5.328e6, 1, delta=0.01)
    # The measured step lies between the bounds.
    self.assertLess(report.time.least, 19.926)
    self.assertGreater(report.time.most, 19.926)

  def test_v2_saves_against_67b(self):
    self.assertEqual(round(cost.saved(172.8, 300.6), 3), 0.425)

  def test_r1(self):
    phases = {'zero': 101e3, 'data': 5e3, 'r1': 41e3}
    self.assertEqual(cost.bill(phases, 2), (147e3, 294e3))

  def test_a_tenth_of_llama_405b(self):
    self.assertEqual(round(cost.saved(2.788e6, 30.84e6), 2), 0.91)
    # And by formula: model FLOPs of both runs, at the same peak.
    llama = plan.count_flops(preset('llama31_405b'), 8192).per_token * 15.6e12
    ours = plan.count_flops(preset('v3'), 4096).per_token * 14.8e12
    self.assertAlmostEqual(ours / llama, 0.09, delta=0.01)
    # 30.84M hours of H100 give a utilization that is possible.
    hours = cost.planned_hours(15.6e12, llama / 15.6e12, 989.5e12, 1.0)
    self.assertBetween(hours / 30.84e6, 0.3, 0.45)

  def test_speculation(self):
    bounds = [cost.speculative_bound(p) for p in (0.85, 0.90)]
    self.assertEqual(bounds, [1.85, 1.90])


@functools.cache
def v3_report() -> plan.Report:
  config = ds.changed(
    preset('v3'), {'compute.dtype': 'bfloat16', 'compute.remat': 'full'}
  )
  return plan.estimate(config, cluster='h800x2048', recipe=plan.v3_recipe())


if __name__ == '__main__':
  absltest.main()
