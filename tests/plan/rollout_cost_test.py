"""Plans of rollouts: each figure by hand, R1-Zero's against what it took."""

import dataclasses

from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.cli import common
from deepseek_jax.cli import plan as planner
from deepseek_jax.plan import flops, memory


def planned(cluster, run):
  return planner.report(common.editable(run), plan.cluster(cluster))


def r1_zero(answer):
  """R1-Zero's rounds on the devices that it had, answers of one length."""
  model = ds.changed(
    ds.presets.v3(), {'compute.dtype': 'bfloat16', 'compute.remat': 'full'}
  )
  run = ds.recipes.grpo_tiny()
  run = dataclasses.replace(run, model=model, objective=ds.GRPOConfig())
  return ds.changed(
    run,
    {
      'data.seq_len': 1024 + answer - 1,
      'mesh.expert': 64,
      'mesh.fsdp': 8,
      'train.batch.size': 512,
      'train.tokens': 512.0 * (1024 + answer - 1) * 10400,
      'objective.kl': 'k3',
      'objective.kl_weight': 0.001,
      'rollouts.prompts': 512,
      'rollouts.group': 16,
      'rollouts.most': answer,
      'rollouts.updates': 16,
      'rollouts.slots': 8192,
    },
  )


class RolloutCostTest(absltest.TestCase):
  def test_each_part_is_what_a_hand_would_count(self):
    run = ds.changed(
      ds.recipes.grpo_tiny(),
      {
        'rollouts.updates': 4,
        'train.batch.size': 64,
        'objective.kl': 'k3',
        'objective.kl_weight': 0.1,
      },
    )
    made = planned('h100', run)
    cost = made.rollouts
    self.assertEqual(cost.tokens, 32 * 8 * 32)
    self.assertEqual(cost.round.rounds, 50)  # 200 updates, 4 a round
    self.assertEqual(cost.round.passes, 2)
    # What is sampled from and the reference, both float32 here.
    weights = made.memory[made.policy]['weights']
    want = made.device_bytes + 2 * weights + cost.cache_bytes
    self.assertEqual(cost.held_bytes, want)
    self.assertTrue(cost.fits)
    alone = ds.changed(
      run, {'objective.kl': 'none', 'objective.kl_weight': 0.0}
    )
    other = planned('h100', alone).rollouts
    self.assertEqual(cost.held_bytes - other.held_bytes, weights)
    narrow = {'model.compute.dtype': 'bfloat16'}
    with_, without = (
      planned('h100', ds.changed(one, narrow)).rollouts.held_bytes
      for one in (run, alone)
    )
    self.assertAlmostEqual((with_ - without) / weights, 1, places=1)
    device = made.cluster.accelerator
    # 64 answers at a time, of 97 tokens before the 32, which all are written.
    whole = memory.cache(run.model, 129).bf16
    self.assertEqual(cost.cache_bytes, 64 * whole)
    reading = made.memory[made.policy]['weights'] + 64 * (
      memory.cache(run.model, 97 + 16).bf16
    )
    reading /= device.memory_bandwidth.value
    work = 64 * min(flops.decode_flops(run.model, 113).values())
    step = max(reading, work / device.bf16.value)
    self.assertAlmostEqual(cost.decode_step, step)
    self.assertAlmostEqual(cost.decode / step, 32 * 256 / 64)
    rate = device.bf16.value * made.recipe.utilization
    forward = lambda n: sum(flops.count_flops(run.model, n).forward.values())
    self.assertAlmostEqual(cost.prefill * rate / (256 * forward(97)), 1)
    self.assertAlmostEqual(cost.scoring * rate / (512 * forward(129)), 1)
    self.assertAlmostEqual(cost.update, 4 * made.time.costed)
    hours = 50 * cost.seconds / 3600
    self.assertAlmostEqual(cost.device_hours / hours, 1)

  def test_one_update_without_a_reference_needs_no_pass(self):
    cost = planned('h100', ds.recipes.grpo_tiny()).rollouts
    self.assertEqual((cost.round.passes, cost.scoring), (0, 0.0))

  def test_text_has_no_rollouts(self):
    self.assertIsNone(planned('h100', ds.recipes.v3_tiny()).rollouts)

  def test_r1_zeros_budget_lies_where_its_answers_do(self):
    self.assertAlmostEqual(plan.R1_ZERO.seconds, 68.28, places=2)
    # 650 rounds of 16 updates took 101 thousand hours. Answers grew from some
    # hundred tokens to ten thousand and more.
    short, long = (
      planned('h800x512', r1_zero(n)).rollouts for n in (512, 16384)
    )
    self.assertEqual(short.round.rounds, 650)
    self.assertLess(short.device_hours * 4, long.device_hours)
    self.assertLess(long.device_hours, plan.R1_ZERO.device_hours)
    self.assertGreater(long.device_hours, plan.R1_ZERO.device_hours / 4)
    self.assertGreater(short.budget, 650)


if __name__ == '__main__':
  absltest.main()
