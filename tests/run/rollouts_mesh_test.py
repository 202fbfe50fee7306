"""Rollouts and steps of GRPO on meshes of fake devices, against one device.

Float32: sums of floats in another order, so 1e-6 of the greatest value after
four updates; the drawn tokens are the same.
"""

import pytest
from absl.testing import absltest

from tests import fake_devices


class MeshTest(absltest.TestCase):
  def check(self, *names):
    module = 'tests.run.rollouts_mesh_worker'
    found = fake_devices.run(module, *names, seconds=2000)
    self.assertEqual(set(found), set(names))
    for name, gaps in found.items():
      with self.subTest(name):
        self.assertTrue(gaps['same'])
        # No weight is copied: the engine has the trainer's buffers.
        self.assertTrue(gaps['shared'])
        self.assertLess(gaps['params'], 1e-6)
        self.assertLess(gaps['biases'], 1e-6)
        self.assertLess(gaps['log_probs'], 1e-5)

  @pytest.mark.slow
  def test_two_devices_share_experts(self):
    self.check('expert 2')

  @pytest.mark.slow
  def test_two_four_and_eight_devices(self):
    self.check(
      'data 2',
      'fsdp 2 expert 2',
      'data 2 tensor 2',
      'expert 8',
      'data 2 fsdp 2 expert 2',
    )


if __name__ == '__main__':
  absltest.main()
