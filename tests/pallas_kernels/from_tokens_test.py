"""Experts whose operands leave the kernels before in float8."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch, permute, target
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.from_tokens import experts_of_tokens


def draw(dtype=jnp.bfloat16, dim=256, width=128):
  rng = np.random.default_rng(0)
  experts = rng.integers(0, 4, (9, 2))  # 3 is nowhere
  plan = permute.plan(jnp.asarray(experts), 3, block=32)
  normal = lambda *size: jnp.asarray(rng.normal(size=size), dtype)
  x, gate_up = normal(9, dim), normal(3, dim, 2 * width) * dim**-0.5
  down = normal(3, width, dim) * width**-0.5
  return x, gate_up, down, plan, normal(plan.source.shape[0], dim)


def one_by_one(x, gate_up, down, plan, limit=None):
  """Rows laid out, activation rounded, and every operand quantised apart."""
  layout = {'block_expert': plan.block_expert, 'used': plan.used}
  product = functools.partial(grouped_matmul, **layout, float8=True)
  h = product(permute.permute(x, plan), gate_up).astype(jnp.float32)
  gate, up = jnp.split(h, 2, axis=-1)
  if limit is not None:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return product((jax.nn.silu(gate) * up).astype(x.dtype), down)


class FromTokensTest(parameterized.TestCase):
  @parameterized.parameters(
    (jnp.float32, None, 0),
    (jnp.float32, 0.7, 0),
    # Two roundings to bfloat16 less: some numbers go to the next of float8.
    (jnp.bfloat16, None, 2e-2),
  )
  def test_value_and_gradients_are_those_of_rows_one_by_one(
    self, dtype, limit, tolerance
  ):
    x, gate_up, down, plan, grad = draw(dtype)
    found = []
    for op in (experts_of_tokens, one_by_one):

      @jax.jit
      def both(*args, op=op):
        fn = lambda *a: op(*a, plan, limit=limit)
        out, pull = jax.vjp(fn, *args)
        return out, pull(grad)

      found.append(jax.tree.leaves(both(x, gate_up, down)))
    for a, b in zip(*found, strict=True):
      self.assertEqual(a.dtype, b.dtype)
      a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
      error = np.linalg.norm(a - b)
      self.assertLessEqual(error, tolerance * np.linalg.norm(b))
      self.assertTrue(a.any())

  def test_on_hopper_operands_leave_the_kernels_in_float8(self):
    x, gate_up, down, plan, grad = draw(dim=512)
    # Blocks of 128 rows, as a plan has by default.
    plan = permute.plan(jnp.zeros((9, 2), jnp.int32), 3, block=128)
    grad = jnp.zeros((plan.source.shape[0], 512), jnp.bfloat16)

    def both(*args):
      out, pull = jax.vjp(lambda *a: experts_of_tokens(*a, plan), *args)
      return out, pull(grad)

    with target.targeting('cuda', '9.0'), dispatch.recorded() as found:
      jax.eval_shape(both, x, gate_up, down)
    ops = {c.op: c.impl for c in found}
    for op in ('permute_fp8', 'swiglu_quantize', 'swiglu_gradient'):
      self.assertEqual(ops[op], 'gpu')
    # Apart are quantised: both weights, the gradient that comes in, and, for
    # the gradients of both weights, two operands each over their rows.
    for op, times in (('quantize', 3), ('quantize_columns', 4)):
      own = [c.impl for c in found if c.op == op]
      self.assertEqual(own, times * ['gpu'])

  def test_bad_widths_are_named(self):
    x, gate_up, down, plan, _ = draw()
    with self.assertRaisesRegex(ValueError, 'disagree on the width'):
      experts_of_tokens(x[:, :128], gate_up, down, plan)
    with self.assertRaisesRegex(ValueError, 'width 100 is not a multiple'):
      experts_of_tokens(x, gate_up[..., :200], down[:, :100], plan)


if __name__ == '__main__':
  absltest.main()
