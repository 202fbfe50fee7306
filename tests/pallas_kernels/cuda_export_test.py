"""Every kernel lowers for CUDA on an installation without a GPU."""

import jax
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import aot_cases

# One small case per operation runs in the fast part.
FAST = (
  'combine',
  'grouped_matmul_fwd_b128',
  'indexer',
  'latent_kv_prefill_t8192_fp8',
  'mla_decode_h16',
  'permute',
  'mla_decode_fp8_h128',
  'sparse_mla',
)
TARGET = 'mosaic_gpu_v2'


def export(case):
  device = jax.sharding.AbstractDevice('NVIDIA H200', 132, 'cuda')
  mesh = jax.sharding.AbstractMesh(
    (1,), ('x',), (jax.sharding.AxisType.Explicit,), abstract_device=device
  )
  args = [jax.ShapeDtypeStruct(*arg) for arg in case.args]
  allowed = [jax.export.DisabledSafetyCheck.custom_call(TARGET)]
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.export.export(
      jax.jit(case.fn), platforms=['cuda'], disabled_checks=allowed
    )(*args)


class CudaExportTest(parameterized.TestCase):
  @parameterized.product(name=FAST)
  def test_kernel_lowers(self, name):
    case = aot_cases.CASES[name]
    self.assertIn(TARGET, export(case).mlir_module())

  @parameterized.product(name=sorted(set(aot_cases.CASES) - set(FAST)))
  @pytest.mark.slow  # under the parameters, or it is lost
  def test_every_other_case_lowers(self, name):
    case = aot_cases.CASES[name]
    self.assertIn(TARGET, export(case).mlir_module())


if __name__ == '__main__':
  absltest.main()
