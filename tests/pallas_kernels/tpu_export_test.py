"""Kernels for TPUs are lowered, and fit into a TPU's memories, without one."""

import functools

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

from pallas_kernels import dispatch, target, tpu_calls
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.grouped_matmul import tpu as grouped
from pallas_kernels.mla_decode import mla_decode, refused
from pallas_kernels.mla_decode import tpu as decode

KERNEL = 'tpu_custom_call'
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


def exported(fn, *args) -> str:
  # A function of its own: what was traced for another target is kept.
  fresh = jax.jit(lambda *args: fn(*args))
  with target.targeting('tpu'):
    made = jax.export.export(fresh, platforms=['tpu'])(*args)
  return made.mlir_module()


def of_pages(new, heads, page, dtype=BF16, batch=4, pages=32):
  """Queries, pages, table and lengths of V3's widths, as shapes."""
  shape = lambda *size: jax.ShapeDtypeStruct(size, dtype)
  return (
    shape(batch, new, heads, 512),
    shape(batch, new, heads, 64),
    shape(batch * pages, page, 512),
    shape(batch * pages, page, 64),
    jax.ShapeDtypeStruct((batch, pages), I32),
    jax.ShapeDtypeStruct((batch,), I32),
  )


def gradients(rows, weights, expert, used):
  fn = lambda *args: grouped_matmul(*args, expert, used=used)
  out, pull = jax.vjp(fn, rows, weights)
  return pull(out)


def of_blocks(dtype=BF16, block=128):
  """Rows, weights and their layout, as shapes."""
  shape = jax.ShapeDtypeStruct
  floats = shape((8 * block, 256), dtype), shape((4, 256, 384), dtype)
  return *floats, shape((8,), I32), shape((), I32)


class ExportTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 128, 64, BF16), (2, 16, 128, BF16), (3, 5, 32, F32), (1, 1, 4096, BF16)
  )
  def test_decoding_is_a_kernel(self, new, heads, page, dtype):
    fn = functools.partial(mla_decode, scale=0.07)
    self.assertIn(KERNEL, exported(fn, *of_pages(new, heads, page, dtype)))

  @parameterized.product(dtype=(BF16, F32), block=(64, 128))
  def test_gradients_of_experts_are_kernels(self, dtype, block):
    text = exported(gradients, *of_blocks(dtype, block))
    # Of rows and of weights; the product itself is XLA's.
    self.assertEqual(text.count(KERNEL), 2)
    self.assertIn('ragged_dot', text)

  @parameterized.parameters('cpu', 'cuda', 'rocm')
  def test_for_another_platform_it_is_one_clear_line(self, platform):
    fn = jax.jit(functools.partial(mla_decode, scale=0.07, impl='tpu'))
    traced = fn.trace(*of_pages(1, 16, 64))
    message = f'mla_decode: its kernel is made for TPUs, .* for {platform};'
    with self.assertRaisesRegex(ValueError, message):
      traced.lower(lowering_platforms=(platform,))

  def test_elsewhere_nothing_changes(self):
    for name in ('cpu', 'rocm'):
      fn = functools.partial(mla_decode, scale=0.07)
      with target.targeting(name), dispatch.recorded() as found:
        jax.eval_shape(fn, *of_pages(1, 16, 64))
        jax.eval_shape(lambda *args: gradients(*args), *of_blocks())
      self.assertEqual({c.impl for c in found}, {'reference'})


class RefusedTest(parameterized.TestCase):
  def refuse(self, reason, fn, *args):
    with self.assertRaisesRegex(NotImplementedError, reason):
      jax.eval_shape(functools.partial(fn, impl='tpu'), *args)
    # Without being asked for it is not taken.
    exported(fn, *args)

  @parameterized.parameters(
    (of_pages(1, 16, 8), '8 tokens a page, not 16'),
    (of_pages(1, 16, 64, jnp.float16), 'dtypes float16, float16, float16 of'),
    (of_pages(16, 128, 64), '2048 rows of queries .* MiB of vector memory'),
    (of_pages(1, 1, 16, batch=512, pages=512), 'more than fit into scalar'),
  )
  def test_decoding_says_what_it_cannot_take(self, args, reason):
    self.refuse(reason, functools.partial(mla_decode, scale=0.07), *args)

  def test_float8_latents_are_left_to_the_reference(self):
    _, _, c, k_r, *_ = of_pages(1, 16, 64)
    c = jax.ShapeDtypeStruct(c.shape, jnp.float8_e4m3fn)
    scales = jax.ShapeDtypeStruct((*c.shape[:2], 4), F32)
    self.assertIn('float8 latents', refused('tpu', BF16, c, k_r, scales))
    self.assertIn('dtypes bfloat16, float8', refused('tpu', BF16, c, k_r))

  @parameterized.parameters(
    (of_blocks(jnp.float16), 'float16 and float16, not both bfloat16'),
    (of_blocks(block=8), 'blocks of 8 rows, not 16'),
  )
  def test_experts_say_what_they_cannot_take(self, args, reason):
    def fn(rows, weights, expert, used, impl=None):
      return grouped_matmul(
        rows, weights.swapaxes(1, 2), expert, transpose=True, impl=impl
      )

    self.refuse(reason, fn, *args)


class MemoryTest(parameterized.TestCase):
  @parameterized.product(page=(64, 128, 4096), new=(1, 2), size=(2, 4))
  def test_a_step_of_v3_fits(self, page, new, size):
    tokens = 512
    per_block, blocks = decode._blocks(page, 32)
    self.assertEqual(per_block * blocks, tokens)
    rows = 128 * new
    needed = decode.vector_memory(rows, tokens, (512, 64), size)
    self.assertLess(needed, tpu_calls.VECTORS)
    copied = 2 * tokens * (512 + 128) * size
    self.assertGreater(needed, copied + 4 * rows * (512 + 2 * tokens))

  @parameterized.parameters(*grouped_shapes.BENCH.values())
  def test_tiles_of_v3_fit(self, counts, dim, out, block):
    rows, inner, columns = grouped.forward_tiles(block, out, dim, 2)
    self.assertEqual((rows, inner), (block, out))
    self.assertEqual(dim % columns, 0)
    operands = 4 * inner * (rows + columns)
    self.assertLess(operands + 8 * rows * columns, tpu_calls.VECTORS)
    rows, left, right = grouped.outer_tiles(block, dim, out)
    # The sum, and two copies of what was summed before.
    needed = 12 * left * right + 4 * rows * (left + right)
    self.assertLess(needed, tpu_calls.VECTORS)


if __name__ == '__main__':
  absltest.main()
