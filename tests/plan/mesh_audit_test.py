"""The planner against XLA for many models on many meshes.

Parameters, argument bytes per device and bytes on the wires are equal to the
last byte. FLOPs are held in audit_test.py.
"""

import pytest
from absl.testing import absltest, parameterized

from tests import fake_devices
from tests.plan.mesh_audit_worker import CASES

FAST = (
  'gqa_data',
  'mla_data',
  'gqa_accumulated',
  'moe_expert',
  'v3_expert',
  'remat_expert',
  'gqa_tensor',
  'mha_tensor',
  'mla_fsdp',
  'mtp_fsdp',
  'mla_context',
  'gqa_context',
)


class MeshAuditTest(parameterized.TestCase):
  def audit(self, names):
    for name, found in fake_devices.run(
      'tests.plan.mesh_audit_worker', *names
    ).items():
      planned, measured = found['planned'], found['measured']
      keys = ['parameters', 'arguments', 'exchange']
      if found['wires']:
        keys += ['context', 'gradients']
        # XLA makes once what all layers share of these.
        self.assertLessEqual(
          measured['context positions'], planned['context positions']
        )
      if found['tensor']:
        keys.append('tensor')
      if found['fsdp']:
        keys += ['fsdp', 'gradients']
      for key in keys:
        with self.subTest(f'{name}: {key}'):
          self.assertEqual(planned[key], measured[key])

  @pytest.mark.slow
  def test_bytes_and_wires_equal_the_compiled_programs(self):
    self.audit(FAST)

  @pytest.mark.slow
  def test_on_every_mesh(self):
    self.assertGreaterEqual(len(CASES), 10)
    self.audit([name for name in CASES if name not in FAST])


if __name__ == '__main__':
  absltest.main()
