"""Kernels for TPUs in Pallas' TPU interpreter, against loops in float64.

It simulates a TPU's memories and copies on a CPU; what was not written is nan,
and its race detector prints what it finds.
"""

import contextlib
import functools
import io

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_calls
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode.shapes import TEST, Shape
from tests.pallas_kernels.mla_decode_test import SCALE, draw, loop

SHAPES = {
  **TEST,
  'empty': Shape((0, 5), 1, 2, 16),
  'several_steps': Shape((600, 40), 2, 3, 32),
  'steps_of_one_long_page': Shape((1100,), 1, 2, 2048),
  'blocks_smaller_than_a_page': Shape((100, 30), 3, 1, 48),
  'all_heads': Shape((70,), 1, 128, 64),
}
BLOCK = 16
# Expert of each block, and how many are in use.
LAYOUTS = (
  ([0, 0, 1, 3, 3, 3], 4, False),
  ([0, 0, 1, 3, 3, 3], 6, True),
  ([2, 2, 0, 1, 1, 3], 5, True),
  ([1, 1], 0, False),
)


def compute(fn, *args):
  """Returns fn(*args) of interpreted kernels, and what was printed."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), tpu_calls.interpreted():
    got = jax.tree.map(np.asarray, jax.jit(fn)(*args))
  return got, out.getvalue()


class DecodeOnTpuTest(parameterized.TestCase):
  def decode(self, *args, scale=SCALE):
    fn = functools.partial(mla_decode, scale=scale, impl='tpu')
    got, printed = compute(fn, *args)
    self.assertNotIn('RACE DETECTED', printed)
    return got

  @parameterized.named_parameters(SHAPES.items())
  def test_it_equals_a_loop_in_float64(self, shape):
    args = draw(shape)
    got = self.decode(*args)
    np.testing.assert_allclose(got, loop(*args), rtol=2e-5, atol=2e-5)

  def test_nothing_behind_the_length_counts_even_if_nan(self):
    args = draw(Shape((90, 0, 17), 2, 2, 32))
    want = self.decode(*args)
    c, k_r, table, lengths = args[2:]
    live = np.zeros(c.shape[:2], bool)
    for row, length in zip(table, lengths):
      at = np.arange(length)
      live[row[at // 32], at % 32] = True
    c[~live] = k_r[~live] = np.nan
    # No page has such a number, or no request may read it.
    table[0, 3:], table[1], table[2, 1:] = 10**6, -5, table[0, 0]
    np.testing.assert_array_equal(self.decode(*args), want)
    np.testing.assert_allclose(want, loop(*args), rtol=2e-5, atol=2e-5)

  def test_requests_may_share_pages(self):
    args = draw(Shape((90, 70), 1, 4, 32))
    args[4][1, :2] = args[4][0, :2]
    want = loop(*args)
    np.testing.assert_allclose(self.decode(*args), want, rtol=2e-5, atol=2e-5)

  def test_a_negative_scale_is_one_too(self):
    args = draw(Shape((40,), 1, 2, 16))
    want = mla_decode(*args, scale=-0.3, impl='reference')
    got = self.decode(*args, scale=-0.3)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)

  def test_in_bfloat16_at_the_widths_of_v3(self):
    *floats, table, lengths = draw(Shape((600, 64), 2, 8, 64))
    rng = np.random.default_rng(1)
    args = [
      jnp.asarray(rng.normal(size=(*a.shape[:-1], width)), jnp.bfloat16)
      for a, width in zip(floats, (512, 64, 512, 64), strict=True)
    ]
    # Scores as far apart as those of a model.
    args[:2] = [q / 6 for q in args[:2]]
    want = loop(*(np.asarray(a, np.float64) for a in args), table, lengths)
    got = self.decode(*args, table, lengths)
    # Probabilities and the result are rounded.
    error = abs(got.astype(np.float64) - want).max()
    self.assertLess(error, 2**-7 * abs(want).max())


def draw_blocks(experts, used):
  rng = np.random.default_rng(0)
  rows = rng.normal(size=(BLOCK * len(experts), 24))
  rows[BLOCK * used :] = 0
  grads = rng.normal(size=(len(rows), 40))
  return rows, rng.normal(size=(4, 24, 40)), grads


class GroupedOnTpuTest(parameterized.TestCase):
  @parameterized.parameters(*LAYOUTS)
  def test_products_and_gradients_are_those_of_a_loop(
    self, experts, used, transpose
  ):
    rows, weights, grads = draw_blocks(experts, used)
    want = [np.zeros(a.shape) for a in (grads, rows, weights)]
    for i, e in enumerate(experts[:used]):
      at = slice(BLOCK * i, BLOCK * (i + 1))
      want[0][at] = rows[at] @ weights[e]
      want[1][at] = grads[at] @ weights[e].T
      want[2][e] += rows[at].T @ grads[at]
    turn = lambda w: w.swapaxes(1, 2) if transpose else w
    layout = {'block_expert': jnp.asarray(experts), 'used': jnp.int32(used)}

    def both(rows, weights, grads):
      fn = lambda *args: grouped_matmul(
        *args, **layout, transpose=transpose, impl='tpu'
      )
      out, pull = jax.vjp(fn, rows, weights)
      return out, *pull(grads)

    args = [jnp.asarray(a, jnp.float32) for a in (rows, turn(weights), grads)]
    got, printed = compute(both, *args)
    self.assertNotIn('RACE DETECTED', printed)
    for g, w in zip((*got[:2], turn(got[2])), want, strict=True):
      np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-5)


class RacesTest(absltest.TestCase):
  def test_a_race_is_caught(self):
    """A kernel that reads what a copy has not delivered."""

    def body(x, y, here, done):
      copy = pltpu.make_async_copy(x, here, done)
      copy.start()
      y[...] = here[...]
      copy.wait()

    x = jnp.ones((8, 128), jnp.float32)

    def run(x):
      return pl.pallas_call(
        body,
        out_shape=x,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=tpu_calls.interpret(),
      )(x)

    try:
      found = compute(run, x)[1]
    except jax.errors.JaxRuntimeError as error:  # of a newer jax
      found = str(error)
      pltpu.reset_tpu_interpret_mode_state()
    self.assertIn('RACE DETECTED', found)


if __name__ == '__main__':
  absltest.main()
