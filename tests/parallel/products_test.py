"""Products in bfloat16: into float32 where a CPU has AMX, gradients too."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.parallel import processor
from deepseek_jax.parallel import products as lib
from deepseek_jax.train import schedules
from deepseek_jax.train.step import initial_state, train_step
from tests import tiny

AMX = processor.Processor('GenuineIntel', frozenset(('amx_bf16', 'amx_tile')))
AMD = processor.Processor('AuthenticAMD', frozenset(('avx512f',)))
FORMS = {
  'BTD,DHK->BTHK': ((2, 5, 8), (8, 3, 4)),
  'BTHV,HVD->BTD': ((2, 5, 3, 4), (3, 4, 8)),
  'BTHN,CHN->BTHC': ((2, 5, 3, 4), (6, 3, 4)),
  'BGJTS,BSGV->BTGJV': ((2, 3, 2, 5, 7), (2, 7, 3, 4)),
  'matmul': ((2, 5, 8), (8, 6)),
}
# Of StableHLO: operands and result of a product.
DOT = re.compile(
  r'dot_general[^\n]*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>'
)


def on(machine):
  return mock.patch.object(processor, 'this', lambda: machine)


def drawn(form, dtype=jnp.bfloat16):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in FORMS[form]]


def run(form, a, b):
  return lib.matmul(a, b) if form == 'matmul' else lib.einsum(form, a, b)


def plain(form, a, b):
  return a @ b if form == 'matmul' else jnp.einsum(form, a, b)


def dots(lowered):
  """Returns (left, right, result) dtypes of all products of a program."""
  found = DOT.findall(lowered.as_text())
  return {tuple(shape.rpartition('x')[2] for shape in one) for one in found}


class ProductsTest(parameterized.TestCase):
  @parameterized.parameters(*FORMS)
  def test_numbers_and_gradients_are_those_of_float64(self, form):
    a, b = drawn(form)
    wide = [np.asarray(x, np.float64) for x in (a, b)]
    with jax.enable_x64(True):
      out, pull = jax.vjp(
        lambda a, b: plain(form, a, b), *map(jnp.asarray, wide)
      )
      seed = np.random.default_rng(1).normal(size=out.shape)
      seed = np.asarray(jnp.asarray(seed, jnp.bfloat16), np.float64)
      want = out, *pull(jnp.asarray(seed))
      want = [np.asarray(x) for x in want]
    with on(AMX):
      out, pull = jax.vjp(lambda a, b: run(form, a, b), a, b)
      got = out, *pull(jnp.asarray(seed, jnp.bfloat16))
    for one, other in zip(got, want):
      self.assertEqual(one.dtype, jnp.bfloat16)
      # One rounding, to 8 bits, of a sum in float32.
      scale = np.abs(other).max()
      np.testing.assert_allclose(
        np.asarray(one, np.float64), other, rtol=2**-8, atol=1e-6 * scale
      )

  @parameterized.parameters(
    (AMX, jnp.float32), (AMD, jnp.bfloat16), (AMD, jnp.float32)
  )
  def test_elsewhere_they_are_jax_own(self, machine, dtype):
    for form in FORMS:
      a, b = drawn(form, dtype)
      with on(machine):
        made = jax.make_jaxpr(lambda a, b, f=form: run(f, a, b))(a, b)
      want = jax.make_jaxpr(lambda a, b, f=form: plain(f, a, b))(a, b)
      self.assertEqual(str(made), str(want))

  def test_on_a_gpu_they_are_jax_own(self):
    a, b = drawn('matmul')
    with on(AMX), mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
      made = jax.make_jaxpr(lib.matmul)(a, b)
    self.assertEqual(str(made), str(jax.make_jaxpr(jnp.matmul)(a, b)))

  @parameterized.parameters('v3', 'gqa', 'mixed')
  def test_no_product_of_a_step_has_a_bfloat16_result(self, name):
    config = ds.changed(tiny.model(name).config, {'compute.dtype': 'bfloat16'})
    # So many tokens that experts are sorted, not all computed.
    batch = {'tokens': jax.ShapeDtypeStruct((2, 33), jnp.int32)}
    cfg = ds.TrainConfig(tokens=1e6, batch=schedules.BatchConfig(2))

    def lowered(machine):
      with on(machine):
        model = ds.build(config)
        state = jax.eval_shape(
          lambda: initial_state(model, cfg, model.init(jax.random.key(0)))
        )
        return dots(jax.jit(train_step(model, cfg)).lower(state, batch))

    self.assertIn(('bf16', 'bf16', 'bf16'), lowered(AMD))
    with_amx = lowered(AMX)
    self.assertIn(('bf16', 'bf16', 'f32'), with_amx)
    for left, right, out in with_amx:
      self.assertNotEqual(out, 'bf16')
      self.assertEqual(left, right)


if __name__ == '__main__':
  absltest.main()
