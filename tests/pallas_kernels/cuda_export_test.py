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


def within(jaxpr, threads=1):
  """(operation, warpgroups that run it) of all there is inside."""
  for eqn in jaxpr.eqns:
    meshes = eqn.params.get('meshes') or (eqn.params.get('mesh'),)
    inner = max(getattr(m, 'num_threads', None) or 1 for m in meshes)
    yield eqn, threads
    for value in eqn.params.values():
      for part in value if isinstance(value, tuple | list) else (value,):
        part = getattr(part, 'jaxpr', part)
        if hasattr(part, 'eqns'):
          yield from within(part, max(threads, inner))


class HazardTest(parameterized.TestCase):
  """What neither the compiler nor the interpreter refuses."""

  @parameterized.product(name=sorted(aot_cases.CASES))
  def test_no_sum_crosses_warps_where_warpgroups_run_side_by_side(self, name):
    # Its scratch is one place for all warpgroups of a thread block.
    case = aot_cases.CASES[name]
    args = [jax.ShapeDtypeStruct(*arg) for arg in case.args]
    several = 0
    for eqn, threads in within(jax.make_jaxpr(case.fn)(*args).jaxpr):
      several = max(several, threads)
      reduces = eqn.primitive.name.startswith('reduce_')
      if threads > 1 and reduces and eqn.invars[0].aval.ndim == 2:
        self.assertEqual(eqn.params['axes'], (1,), name)
    if name.startswith(('indexer', 'grouped', 'mla_decode', 'sparse_mla')):
      self.assertEqual(several, 2)  # the walk saw inside the kernels


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
