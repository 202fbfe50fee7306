"""The device that a program is for decides, not the host that traces it."""

import logging
import types
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from pallas_kernels import aot_cases, compat, dispatch, target
from pallas_kernels.target import Target

CPU = jax.devices('cpu')[0]
ALLOWED = [jax.export.DisabledSafetyCheck.custom_call('mosaic_gpu_v2')]


def gpu(capability: str, version='PJRT C API cuda 13000', platform='gpu'):
  """Makes a device that says of itself what a GPU says."""
  return types.SimpleNamespace(
    platform=platform,
    device_kind='some GPU',
    compute_capability=capability,
    core_count=99,
    client=types.SimpleNamespace(platform_version=version),
  )


def abstract(kind: str, platform='cuda') -> jax.sharding.AbstractMesh:
  device = jax.sharding.AbstractDevice(kind, 132, platform)
  explicit = jax.sharding.AxisType.Explicit
  return jax.sharding.AbstractMesh(
    (1,), ('x',), (explicit,), abstract_device=device
  )


def picked() -> str:
  """Returns which implementation an operation takes where none is forced."""
  functions = {'reference': lambda: 'reference', 'gpu': lambda: 'gpu'}
  return dispatch.run('op', None, functions)


class TargetTest(parameterized.TestCase):
  @parameterized.parameters(
    (gpu('8.0'), Target('cuda', '8.0', 99), False),
    (gpu('9.0'), Target('cuda', '9.0', 99), True),
    (gpu('9.0', platform='cuda'), Target('cuda', '9.0', 99), True),
    (gpu('10.0'), Target('cuda', '10.0', 99), False),
    (gpu('12.0'), Target('cuda', '12.0', 99), False),
    (gpu('gfx942'), Target('rocm', 'gfx942', 99), False),
    # One that reports a number all the same.
    (gpu('9.4', 'PJRT C API rocm 60300'), Target('rocm', '9.4', 99), False),
  )
  def test_a_device_is_known_by_platform_and_capability(
    self, device, want, hopper
  ):
    got = target.of_device(device)
    self.assertEqual(got, want)
    self.assertEqual(got.is_hopper, hopper)

  @parameterized.parameters(
    ('NVIDIA H200', '9.0'),
    ('NVIDIA H100 80GB HBM3', '9.0'),
    ('NVIDIA GH200 480GB', '9.0'),
    ('NVIDIA H20', '9.0'),
    ('NVIDIA A100-SXM4-80GB', '8.0'),
    ('NVIDIA B200', '10.0'),
    ('NVIDIA GB300', '10.3'),
    ('NVIDIA GeForce RTX 4090', ''),
  )
  def test_an_abstract_device_is_known_by_its_name(self, kind, capability):
    with jax.sharding.use_abstract_mesh(abstract(kind)):
      self.assertEqual(target.current(), Target('cuda', capability, 132))
      self.assertEqual(compat.num_sms(), 132)

  def test_what_says_most_decides(self):
    self.assertEqual(target.current().platform, 'cpu')
    devices = mock.patch.object(jax, 'devices', lambda *_: [gpu('9.0')])
    with devices:
      self.assertEqual(picked(), 'gpu')
      self.assertEqual(compat.num_sms(), 99)
      # A host with a Hopper GPU that computes on its CPU.
      with jax.default_device(CPU):
        self.assertEqual(picked(), 'reference')
      with jax.sharding.use_abstract_mesh(abstract('NVIDIA B200')):
        self.assertEqual(picked(), 'reference')
      with target.placed_on(CPU):
        self.assertEqual(picked(), 'reference')
        with target.targeting('cuda', '9.0'):
          self.assertEqual(picked(), 'gpu')
      # By its name, too: jax.default_device takes one.
      only = lambda name=None: [gpu('9.0') if name is None else CPU]
      with mock.patch.object(jax, 'devices', only), jax.default_device('cpu'):
        self.assertEqual(picked(), 'reference')
    with target.targeting('cuda', '9.0'), target.placed_on(CPU):
      self.assertEqual(picked(), 'gpu')
    self.assertEqual(picked(), 'reference')

  @parameterized.parameters(
    ('cpu', '', 'reference'),
    ('tpu', '', 'reference'),
    ('rocm', 'gfx942', 'reference'),
    ('rocm', '9.0', 'reference'),
    ('cuda', '', 'reference'),
    ('cuda', '8.0', 'reference'),
    ('cuda', '9.0', 'gpu'),
    ('cuda', '10.0', 'reference'),
    ('cuda', '90.0', 'reference'),
  )
  def test_kernels_are_for_named_hoppers_alone(self, name, capability, want):
    with target.targeting(name, capability):
      self.assertEqual(picked(), want)

  def test_kernels_for_tpus_are_for_tpus_alone(self):
    functions = {name: lambda name=name: name for name in ('reference', 'tpu')}
    for name in ('cpu', 'rocm', 'tpu', 'cuda'):
      with target.targeting(name, '9.0' if name == 'cuda' else ''):
        got = dispatch.run('op', None, functions)
        self.assertEqual(got, 'tpu' if name == 'tpu' else 'reference')

  def test_a_target_that_is_none_is_named(self):
    for platform, capability, message in (
      ('gpu', '9.0', "platform='gpu'; use 'cpu', 'cuda', 'rocm' or 'tpu'"),
      ('cuda', 'sm_90a', "capability='sm_90a'; give one as '8.0'"),
      ('cuda', '9', "capability='9'"),
    ):
      wrong = self.assertRaisesRegex(ValueError, message)
      with wrong, target.targeting(platform, capability):
        pass

  def test_the_reason_names_the_target(self):
    dispatch.say_once.cache_clear()
    with (
      target.targeting('cuda', '8.0'),
      self.assertLogs('pallas_kernels', logging.INFO) as logs,
    ):
      picked()
    self.assertIn('the target, cuda 8.0, is not a Hopper', logs.output[0])


class GuardTest(parameterized.TestCase):
  @parameterized.product(
    name=('permute', 'combine_bwd', 'latent_kv_prefill_t8192_fp8'),
    platform=('tpu', 'rocm', 'cpu'),
  )
  def test_a_kernel_for_another_platform_is_one_clear_line(
    self, name, platform
  ):
    case = aot_cases.CASES[name]
    args = [jax.ShapeDtypeStruct(*arg) for arg in case.args]
    message = f'kernel is made for NVIDIA GPUs, .* lowered for {platform}'
    with self.assertRaisesRegex(ValueError, message) as caught:
      jax.export.export(
        jax.jit(case.fn), platforms=[platform], disabled_checks=ALLOWED
      )(*args)
    self.assertNotIn('\n', str(caught.exception))

  def test_outside_jit_too(self):
    case = aot_cases.CASES['permute']
    args = [jnp.zeros(*arg) for arg in case.args]
    with self.assertRaisesRegex(ValueError, 'permute: .* lowered for cpu'):
      case.fn(*args)


if __name__ == '__main__':
  absltest.main()
