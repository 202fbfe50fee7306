"""permute and combine against loops over (token, choice) in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from pallas_kernels import permute as op
from pallas_kernels import target
from pallas_kernels.permute import shapes
from pallas_kernels.permute.reference import num_blocks
from pallas_kernels.quantize import ACTIVATION_FLOOR, quantize

CASES = [(name, shape) for name, shape in shapes.TEST.items()]


def draw(shape, seed=0):
  rng = np.random.default_rng(seed)
  size = (shape.tokens, shape.choices)
  experts = rng.integers(0, shape.experts, size).astype(np.int32)
  lost = rng.random(size) < shape.nowhere
  experts = np.where(lost, shape.experts, experts).astype(np.int32)
  x = rng.normal(size=(shape.tokens, shape.dim)).astype(np.float32)
  weights = rng.random(size).astype(np.float32)
  return experts, x, weights


def expected_slots(experts, num_experts, block):
  """Slots by a loop: experts in order, their choices in flat order."""
  slot, row = {}, 0
  for e in range(num_experts):
    for i in np.flatnonzero(experts.reshape(-1) == e):
      slot[int(i)] = row
      row += 1
    row = -(-row // block) * block
  return slot


class PermuteTest(parameterized.TestCase):
  @parameterized.named_parameters(CASES)
  def test_plan_is_the_stable_block_aligned_order(self, shape):
    experts, _, _ = draw(shape)
    plan = op.plan(jnp.asarray(experts), shape.experts, block=shape.block)
    rows = plan.source.shape[0]
    block = rows // plan.block_expert.shape[0]
    slots = expected_slots(experts, shape.experts, block)
    flat = np.full(experts.size, rows)
    source = np.full(rows, experts.size)
    for i, row in slots.items():
      flat[i], source[row] = row, i
      self.assertEqual(plan.block_expert[row // block], experts.reshape(-1)[i])
    np.testing.assert_array_equal(plan.slot.reshape(-1), flat)
    np.testing.assert_array_equal(plan.source, source)
    np.testing.assert_array_equal(
      plan.counts,
      np.bincount(experts.reshape(-1), minlength=shape.experts + 1)[:-1],
    )
    last = max(slots.values(), default=-1)
    self.assertEqual(int(plan.used), last // block + 1)
    self.assertBetween(int(plan.block_expert.min()), 0, shape.experts - 1)
    self.assertBetween(int(plan.block_expert.max()), 0, shape.experts - 1)

  @parameterized.named_parameters(CASES)
  def test_there_and_back_equals_a_loop_in_float64(self, shape):
    experts, x, weights = draw(shape)
    plan = op.plan(jnp.asarray(experts), shape.experts, block=shape.block)
    rows = op.permute(jnp.asarray(x), plan)
    y = op.combine(rows * 2, jnp.asarray(weights), plan)
    kept = np.where(experts < shape.experts, weights.astype(np.float64), 0)
    np.testing.assert_allclose(
      y, 2 * kept.sum(1, keepdims=True) * x, rtol=1e-6, atol=1e-6
    )
    filler = np.asarray(plan.source) == experts.size
    self.assertFalse(np.asarray(rows)[filler].any())

  @parameterized.named_parameters(CASES)
  def test_gradients_equal_those_of_one_hot_matmuls(self, shape):
    experts, x, weights = draw(shape)
    plan = op.plan(jnp.asarray(experts), shape.experts, block=shape.block)
    rows = plan.source.shape[0]
    place = jax.nn.one_hot(plan.slot, rows)  # [N K M]; all zero for nowhere
    gain = np.random.default_rng(1).normal(size=(rows, 1))
    out = np.random.default_rng(2).normal(size=x.shape)

    def gathers(x, weights):
      return (op.combine(op.permute(x, plan) * gain, weights, plan) * out).sum()

    def dense(x, weights):
      moved = jnp.einsum('NKM,ND->MD', place, x, precision='highest') * gain
      back = jnp.einsum(
        'NK,NKM,MD->ND', weights, place, moved, precision='highest'
      )
      return (back * out).sum()

    got = jax.jit(jax.grad(gathers, (0, 1)))(x, weights)
    want = jax.jit(jax.grad(dense, (0, 1)))(x, weights)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
      got,
      want,
    )

  @parameterized.product(name=('plain', 'all_nowhere'), power=(False, True))
  def test_float8_rows_are_those_of_their_tokens(self, name, power):
    experts, _, _ = draw(shapes.TEST[name])
    x = np.random.default_rng(3).normal(size=(len(experts), 256))
    x = jnp.asarray(x, jnp.float32)
    plan = op.plan(jnp.asarray(experts), 6, block=8)
    x = x.at[0].multiply(1e-7)  # below the floor of activations
    rows, scales = op.permute_fp8(x, plan, power_of_two=power)
    q, own = quantize(x, power_of_two=power, floor=ACTIVATION_FLOOR)
    for row, choice in enumerate(np.asarray(plan.source)):
      token, real = choice // experts.shape[1], choice < experts.size
      want = (q[token], own[token]) if real else (0 * q[0], 0 * own[0])
      np.testing.assert_array_equal(rows[row], want[0])
      np.testing.assert_array_equal(scales[row], want[1])

  def test_bfloat16_sums_in_float32(self):
    experts = jnp.zeros((1, 8), jnp.int32)
    plan = op.plan(experts, 1, block=8)
    rows = jnp.ones((8, 4), jnp.bfloat16)
    weights = jnp.asarray([[256.0] + [0.5] * 7])  # bf16 would stay at 256
    y = op.combine(rows, weights, plan)
    np.testing.assert_array_equal(y, jnp.full((1, 4), 260, jnp.bfloat16))
    # Weights that bfloat16 would round to 1 and to -1, and their sum to 0.
    weights = jnp.asarray([[1 + 2.0**-9, -1.0] + [0.0] * 6])
    y = op.combine(rows, weights, plan)
    np.testing.assert_array_equal(y, jnp.full((1, 4), 2.0**-9, jnp.bfloat16))

  @parameterized.product(choices=(1, 7, 64), experts=(1, 3, 70), block=(1, 8))
  def test_block_bound_is_reached_and_never_passed(
    self, choices, experts, block
  ):
    active = min(choices, experts)
    # One row for every expert but the first is the worst spread.
    counts = [choices - active + 1] + [1] * (active - 1)
    worst = sum(-(-c // block) for c in counts)
    bound = num_blocks(choices, experts, block)
    self.assertBetween(worst, 1, bound)
    self.assertLessEqual(bound - worst, 1)

  @parameterized.parameters(
    ('cpu', '', 2288, 1024),
    ('cuda', '8.0', 764, 268),
    ('cuda', '9.0', 764, 268),
    ('rocm', '', 764, 268),
    ('tpu', '', 764, 268),
  )
  def test_only_a_cpu_gets_small_blocks(self, platform, capability, many, few):
    # Elsewhere each block reads its expert's weights.
    for tokens, want in ((4096, many), (128, few)):
      experts = jax.ShapeDtypeStruct((tokens, 8), jnp.int32)
      with target.targeting(platform, capability):
        made = jax.eval_shape(
          functools.partial(op.plan, num_experts=256), experts
        )
      self.assertEqual(made.block_expert.shape, (want,))

  def test_compiled_backward_has_no_scatter(self):
    experts, x, weights = draw(shapes.TEST['plain'])
    plan = op.plan(jnp.asarray(experts), 5, block=8)

    def loss(x, weights, plan):
      return op.combine(op.permute(x, plan), weights, plan).sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(x, weights, plan).as_text()
    self.assertIn('gather', text)
    self.assertNotIn('scatter', text)

  def test_unsupported_kernel_shape_says_why(self):
    plan = op.plan(jnp.zeros((4, 1), jnp.int32), 1, block=4)
    with self.assertRaisesRegex(NotImplementedError, 'width 100'):
      op.permute(jnp.zeros((4, 100)), plan, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'width 640'):
      op.permute_fp8(jnp.zeros((4, 640)), plan, impl='gpu')
    with self.assertRaisesRegex(NotImplementedError, 'dtype float16'):
      rows = jnp.zeros((4, 256), jnp.float16)
      op.combine(rows, jnp.ones((4, 1)), plan, impl='gpu')

  def test_bad_input_names_the_field(self):
    with self.assertRaisesRegex(ValueError, 'experts is float32'):
      op.plan(jnp.zeros((2, 2)), 4)
    plan = op.plan(jnp.zeros((2, 1), jnp.int32), 1)
    with self.assertRaisesRegex(ValueError, r'x is \[2, 64\]'):
      op.permute_fp8(jnp.zeros((2, 64)), plan)
    with self.assertRaisesRegex(NotImplementedError, 'has no gradient'):
      jax.grad(lambda x: op.permute_fp8(x, plan)[1].sum())(jnp.ones((2, 128)))
    with self.assertRaisesRegex(ValueError, r'under 2\*\*31'):
      op.plan(jax.ShapeDtypeStruct((2**20, 8), jnp.int32), 256)


if __name__ == '__main__':
  absltest.main()
