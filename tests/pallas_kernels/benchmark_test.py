"""The benchmark's cases and contenders, as far as a CPU can tell."""

import functools
import importlib
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from benchmarks import kernel_cases, kernel_timing, kernel_torch
from benchmarks.kernel_work import Work, bf16, fresh_keys
from pallas_kernels import dispatch, target
from tests import tiny

RATES = {'flops': 1e12, 'bytes': 1e12}


def small_case(op, shape='') -> Work:
  shapes, make, small = kernel_cases.OPS[op]
  return make(small(shapes[shape or next(iter(shapes))]))


def reference_error(work) -> float:
  """Of the case's operation without a kernel, as a share of the largest."""
  got = work.op(*work.args, impl='reference')
  want = jax.jit(work.exact)(*work.args)
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  wide = lambda a: np.asarray(a, np.float64)
  return tiny.largest(
    np.abs(wide(g) - wide(w)).max() / np.abs(wide(w)).max() for g, w in pairs
  )


def five_us(*_) -> tuple[float, str]:
  return 5.0, 'by hand'


def hopper():
  device = jax.sharding.AbstractDevice('NVIDIA H200', 132, 'cuda')
  explicit = jax.sharding.AxisType.Explicit
  return jax.sharding.AbstractMesh(
    (1,), ('x',), (explicit,), abstract_device=device
  )


class BenchmarkTest(parameterized.TestCase):
  def test_every_direction_of_every_operation_is_timed(self):
    backward = ('permute', 'combine', 'sinkhorn', 'mla_prefill', 'sparse_mla')
    for op in (*backward, 'grouped_matmul'):
      self.assertIn(op, kernel_cases.OPS)
      self.assertIn(op + '_bwd', kernel_cases.OPS)
    blocks = {s.block for s in kernel_cases.OPS['grouped_matmul'][0].values()}
    self.assertEqual(blocks, {64, 128})

  @parameterized.parameters('permute_bwd', 'combine_bwd', 'sinkhorn_bwd')
  def test_a_case_computes_what_it_is_compared_with(self, op):
    work = small_case(op)
    self.assertLess(reference_error(work), 2**-7)
    self.assertGreater(work.moved, 0)

  @parameterized.parameters(
    ('sparse_mla', 'v4_csa_s8192'),
    ('sparse_mla_bwd', 'v4_hca_s8192'),
    ('sparse_gqa', ''),
    ('engine_decode', ''),
    ('train_step', ''),
  )
  @pytest.mark.slow
  def test_so_does_a_case_of_newer_models_and_of_whole_ones(self, op, shape):
    work = small_case(op, shape)
    run = jax.jit(lambda *a: work.op(*a, impl='reference'))
    got, want = run(*work.args), jax.jit(work.exact)(*work.args)
    error = kernel_timing.worst_error(got, want)
    self.assertLess(error, work.tolerance)
    self.assertGreater(work.flops, 0)
    if not work.tokens:
      return
    # As it is timed: what it changes is donated, and tokens are told.
    step = lambda *a: work.in_place(*a, impl='reference')
    call = kernel_timing.InPlace(step, work.args)
    for _ in range(2):
      call()
    with (
      mock.patch.object(kernel_timing, 'device_us', five_us),
      mock.patch.object(kernel_timing, 'wall_us', lambda *_: 5.0),
    ):
      row = next(kernel_timing.time_case(work, RATES))
    rate = row['tokens_per_second']
    self.assertAlmostEqual(rate * 5e-6 / work.tokens, 1)

  @parameterized.parameters(*kernel_cases.OPS)
  def test_the_kernel_of_every_case_is_reached(self, op):
    """Traced for Hopper, where it must be a kernel, small and as it is timed.

    Nothing is allocated: arrays are drawn when their shapes are known.
    """
    shapes, make, small = kernel_cases.OPS[op]
    for shape in shapes.values():
      self.check_traced(functools.partial(make, small(shape)))
      self.check_traced(functools.partial(make, shape))

  def check_traced(self, make):
    def traced():
      work = make()
      call = work.in_place or work.op
      return call(*work.args, impl='gpu')

    with target.targeting('cuda', '9.0'), dispatch.recorded() as choices:
      jax.eval_shape(traced)
    self.assertIn('gpu', {choice.impl for choice in choices})

  def test_a_cache_is_donated_call_after_call(self):
    work = small_case('latent_kv')
    write = lambda *a: work.in_place(*a, impl='reference')
    call = kernel_timing.InPlace(write, work.args)
    self.assertIsInstance(call, jax.stages.Wrapped)
    first = call().c
    second = call()
    self.assertTrue(first.is_deleted())
    # Compiled as it is timed: one operation at a time rounds otherwise.
    want = jax.jit(write)(*work.args)
    np.testing.assert_array_equal(second.c, want.c)

  def test_torchs_grouped_matmul_is_the_same_product(self):
    counts = jnp.asarray([24, 0, 40])
    rows, weights = (
      bf16(key, *size)
      for key, size in zip(fresh_keys(2), ((64, 32), (3, 32, 48)))
    )
    got = kernel_torch.grouped_mm(rows, weights, counts)()
    want = jax.lax.ragged_dot(
      rows, weights, counts, preferred_element_type=jnp.float32
    )
    error = np.abs(got.float().numpy() - want).max() / np.abs(want).max()
    self.assertLess(error, 2**-8)

  def test_an_absent_library_is_a_note_with_its_reason(self):
    work = small_case('mla_decode')
    with mock.patch.object(kernel_timing, 'device_us', five_us):
      *_, row = kernel_timing.time_case(work, RATES)
    self.assertEqual(row['over_xla'], 1)
    self.assertRegex(row['note'], 'flash_mla: torch .* finds no CUDA')

    def absent(name):
      raise ImportError(f'No module named {name}')

    kernel_torch.torch_with_cuda.cache_clear()
    work = small_case('grouped_matmul')
    with (
      mock.patch.object(kernel_timing, 'device_us', five_us),
      mock.patch.object(importlib, 'import_module', absent),
    ):
      *_, row = kernel_timing.time_case(work, RATES)
    self.assertEqual(row['note'], 'torch: No module named torch')
    self.assertNotIn('over_torch', row)

  def test_jaxs_triton_decoding_refuses_latents_by_itself(self):
    shapes = (
      ((4, 1, 128, 512), jnp.bfloat16),
      ((4, 1, 128, 64), jnp.bfloat16),
      ((256, 64, 512), jnp.bfloat16),
      ((256, 64, 64), jnp.bfloat16),
      ((4, 64), jnp.int32),
      ((4,), jnp.int32),
    )
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    fn = jax.jit(small_case('mla_decode').naive['triton'])
    with (
      warnings.catch_warnings(),
      jax.sharding.use_abstract_mesh(hopper()),
      self.assertRaisesRegex(Exception, 'power of 2'),
    ):
      warnings.simplefilter('ignore', DeprecationWarning)
      jax.export.export(fn, platforms=['cuda'])(*args)


if __name__ == '__main__':
  absltest.main()
