"""Every kernel lowers for CUDA on an installation without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

from pallas_kernels import aot_cases
from pallas_kernels.sparse_mla import sparse_mla

# One small case per operation runs in the fast part.
FAST = (
  'combine',
  'combine_bwd',
  'compress_bwd_csa_keys_t8192',
  'grouped_matmul_fwd_b128',
  'index_candidates_s65536_m128',
  'indexer',
  'indexer_fp8_shared',
  'latent_kv_prefill_t8192_fp8',
  'mla_decode_h16',
  'permute',
  'permute_fp8',
  'router_v2_lite_t8192',
  'mla_decode_fp8_h128',
  'sparse_mla',
  'sparse_mla_v4',
  'sparse_gqa',
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
    if name.startswith(('indexer', 'grouped', 'mla_decode', 'sparse_')):
      # The walk saw inside the kernels.
      fetches = name.startswith('grouped_matmul_fp8_b')
      self.assertEqual(several, 3 if fetches else 2)
    if name.startswith('router'):
      self.assertEqual(several, 4)

  def test_a_grid_goes_no_further_than_it_can(self):
    # All axes but the last end at 65,535.
    bf, i32 = jnp.bfloat16, jnp.int32
    args = [((1, 70_000, 64, n), bf) for n in (512, 64)]
    args += [((1, 256, n), bf) for n in (512, 64)] + [((1, 70_000, 64), i32)]
    op = functools.partial(sparse_mla, scale=1.0, impl='gpu')
    seen = []
    for eqn, _ in within(
      jax.make_jaxpr(op)(*(jax.ShapeDtypeStruct(*a) for a in args)).jaxpr
    ):
      for m in eqn.params.get('meshes') or (eqn.params.get('mesh'),):
        seen += [getattr(m, 'grid', ())]
    grids = [grid for grid in seen if grid]
    self.assertEqual(sum(grid[0] for grid in grids), 70_000)
    self.assertLessEqual(max(max(grid[:-1]) for grid in grids), 65_535)


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
