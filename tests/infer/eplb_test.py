"""Copies of busy experts: the published vector, and what must always hold."""

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.infer import eplb

WEIGHT = [
  [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
  [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
WANT = [
  [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
  [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


class RebalanceTest(parameterized.TestCase):
  def test_the_published_vector(self):
    got = eplb.rebalance_experts(WEIGHT, 16, 4, 2, 8)
    self.assertEqual(got.expert.tolist(), WANT)

  @parameterized.product(groups=(1, 3, 4), nodes=(1, 2), seed=(0, 1))
  def test_every_expert_has_its_copies(self, groups, nodes, seed):
    weight = np.random.default_rng(seed).gamma(0.5, size=(3, 12))
    got = eplb.rebalance_experts(weight, 20, groups, nodes, 4)
    for layer in range(3):
      for expert in range(12):
        found = np.flatnonzero(got.expert[layer] == expert)
        self.assertNotEmpty(found)
        self.assertEqual(got.counts[layer, expert], len(found))
        listed = got.copies[layer, expert]
        self.assertEqual(sorted(listed[: len(found)]), found.tolist())
        self.assertTrue((listed[len(found) :] == -1).all())

  def test_a_group_stays_on_one_node(self):
    got = eplb.rebalance_experts(WEIGHT, 16, 4, 2, 8)
    group = got.expert.reshape(2, 2, 8) // 3  # [layer node copy]
    for layer in group:
      self.assertEmpty(set(layer[0]) & set(layer[1]))

  def test_busy_experts_make_devices_more_even(self):
    weight = np.random.default_rng(3).gamma(0.3, size=(4, 32))

    def worst(copies):
      got = eplb.rebalance_experts(weight, copies, 1, 1, 8)
      load = weight / got.counts
      on = np.take_along_axis(load, got.expert, 1).reshape(4, 8, -1).sum(-1)
      return (on.max(axis=1) / on.mean(axis=1)).mean()

    self.assertLess(worst(48), worst(32))
    self.assertLess(worst(48), 1.1)

  @parameterized.parameters(
    (8, 1, 1, 4, 'num_replicas = 8'),
    (14, 1, 1, 4, 'multiple of num_gpus = 4'),
    (16, 5, 1, 4, 'num_groups = 5'),
    (16, 4, 3, 4, 'num_nodes = 3'),
  )
  def test_sizes_that_do_not_divide(self, copies, groups, nodes, gpus, message):
    with self.assertRaisesRegex(ds.InputError, message):
      eplb.rebalance_experts(WEIGHT, copies, groups, nodes, gpus)


if __name__ == '__main__':
  absltest.main()
