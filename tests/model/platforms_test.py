"""The platform that a program is for decides what is in it, not the host."""

import functools

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.train.schedules import BatchConfig
from deepseek_jax.train.step import TrainConfig, initial_state, train_step
from pallas_kernels import target
from tests import tiny
from tests.model.kernels_mesh_worker import config

KERNEL = 'mosaic_gpu_v2'
TPU_KERNEL = 'tpu_custom_call'
B, T = 2, 256


def tokens(length: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((B, length), jnp.int32)


def traced(model: ds.Model, phase: str) -> jax.stages.Traced:
  """Returns a program of the model, traced for whatever is the target."""
  if phase == 'train':
    cfg = TrainConfig(1e12, BatchConfig(B))
    start = lambda key: initial_state(model, cfg, model.init(key))
    state = jax.eval_shape(start, jax.random.key(0))
    batch = {'tokens': tokens(T + 1)}
    return jax.jit(train_step(model, cfg)).trace(state, batch)
  variables = jax.eval_shape(model.init, jax.random.key(0))
  cache = jax.eval_shape(functools.partial(model.init_cache, B, T + 64))
  run = lambda v, t, c: model.apply(v, t, cache=c)
  if phase == 'decode':
    cache = jax.eval_shape(run, variables, tokens(T), cache).cache
  length = 1 if phase == 'decode' else T
  return jax.jit(run).trace(variables, tokens(length), cache)


def text(program: jax.stages.Traced, platform: str) -> str:
  return program.lower(lowering_platforms=(platform,)).as_text()


class PlatformsTest(parameterized.TestCase):
  @parameterized.parameters(
    # Loops that end when the data says so, at most: none but on a CPU. What
    # is left: layers, blocks of rows, and searches of a known depth.
    ('train', 30, 20),
    ('prefill', 8, 5),
    ('decode', 0, 1),
  )
  def test_only_a_cpu_gets_the_loops_of_a_cpu(self, phase, least, most):
    program = traced(tiny.model('v3'), phase)
    loops = {
      p: text(program, p).count('stablehlo.while')
      for p in ('cpu', 'cuda', 'rocm', 'tpu')
    }
    self.assertGreaterEqual(loops.pop('cpu'), least)
    for platform, count in loops.items():
      self.assertLessEqual(count, most, platform)

  @parameterized.product(
    phase=('train', 'prefill', 'decode'),
    capability=('', '8.0', '9.0', '10.0'),
  )
  def test_kernels_are_for_the_capability_that_is_named(
    self, phase, capability
  ):
    with target.targeting('cuda', capability):
      program = traced(ds.build(config('v3')), phase)
    if capability != '9.0':
      self.assertNotIn(KERNEL, text(program, 'cuda'))
      return
    self.assertIn(KERNEL, text(program, 'cuda'))
    with self.assertRaisesRegex(ValueError, 'lowered for tpu'):
      text(program, 'tpu')

  @parameterized.parameters(
    # Decoding's own, and the gradients of experts by megablox.
    ('train', {'gmm': 2, 'tgmm': 2}),
    ('prefill', {}),
    ('decode', {'mla_decode': 1}),
  )
  def test_a_tpu_gets_its_own_kernels(self, phase, want):
    with target.targeting('tpu'):
      program = traced(ds.build(config('v3')), phase)
    made = text(program, 'tpu')
    self.assertEqual(made.count(TPU_KERNEL), sum(want.values()))
    self.assertIn('ragged_dot', made)
    for name in want:
      self.assertIn(name, made)
    if want:
      with self.assertRaisesRegex(ValueError, 'for TPUs, .* lowered for cuda'):
        text(program, 'cuda')


if __name__ == '__main__':
  absltest.main()
