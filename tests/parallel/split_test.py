"""Every attention over split sequences equals one device's.

Float32, sums in another order: 1e-5 of the greatest value. What is gathered is
never of the size of scores, or of every head's keys, and matmuls are divided.
"""

import math

import pytest
from absl.testing import absltest, parameterized

from tests import fake_devices
from tests.parallel import split_worker as worker

FAST = (
  'qk_norm context=2 tensor=2',
  'dsa context=2 tensor=2',
  'csa context=4 packed',
  'csa context=2 tensor=2',
  'dsa work',
)
# Numbers that a device may gather of a token at a time.
WIDEST = {
  'gqa': 2 * 6,
  'mha': 4 * 6,
  'qk_norm': 2 * 6,
  'dsa': worker.DSA.kv_rank,
  'dsa_dense': worker.DSA.kv_rank,
  'in_blocks': worker.DSA.kv_rank,
  'nsa': 2 * 6,
}
# Matmuls of the last device over its share of one device's. Above 1 is what
# it does more: its queries see every key, where one device skips the keys ahead
# of a block of queries (the dense ones); and every device expands all latents,
# or makes blocks anew that straddle borders.
MOST = {
  'gqa': 1.35,
  'mha': 1.35,
  'qk_norm': 1.35,
  'dsa_dense': 1.35,
  'dsa': 1.1,
  'csa': 1.1,
  'nsa': 1.1,
}


class SplitCase(parameterized.TestCase):
  def check(self, names):
    for case, found in fake_devices.run(
      'tests.parallel.split_worker', *names, devices=4
    ).items():
      name = case.split()[0]
      with self.subTest(case):
        if case.endswith('work'):
          share = 4 * found['split'] / found['alone']
          self.assertLess(share, MOST.get(name, 1.05), case)
          continue
        for key in ('values', 'gradients', 'loss'):
          self.assertLess(found[key], 1e-5, key)
        self.small(found['gathered'], name)
        for value in found['statistics'].values():
          self.assertGreater(value, 0)

  def small(self, shapes, name):
    """Nothing of S x S, no keys of every head."""
    name = name.removesuffix('_ties')
    most = worker.B * worker.T * WIDEST.get(name, worker.WINDOW.head_dim)
    for shape in shapes:
      self.assertLessEqual(math.prod(shape), most, shape)
      self.assertLess(shape.count(worker.T), 2, shape)


class SplitTest(SplitCase):
  @pytest.mark.slow
  def test_sparse_layers_equal_one_device(self):
    self.check(FAST)


@pytest.mark.slow
class SplitSweep(SplitCase):
  @parameterized.parameters(*worker.LAYERS)
  def test_on_every_mesh(self, name):
    cases = [c for c in worker.CASES if c.split()[0] == name]
    self.check([c for c in cases if c not in FAST])


if __name__ == '__main__':
  absltest.main()
