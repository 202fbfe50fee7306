"""Like interpreted.py, for variants of what experts compute.

python tests/pallas_kernels/interpreted_experts.py OP
"""

import functools
import sys

import interpreted
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import permute
from pallas_kernels.grouped_matmul import (
  grouped_matmul_fp8,
  grouped_swiglu,
)
from pallas_kernels.grouped_matmul import shapes as grouped_shapes
from pallas_kernels.permute import shapes as permute_shapes
from pallas_kernels.swiglu_quantize import shapes as swiglu_shapes
from pallas_kernels.swiglu_quantize import swiglu_gradient, swiglu_quantize

BF16 = interpreted.BF16


def check_grouped_swiglu():
  def both(rows, gate_up, grad, expert, used, limit, impl):
    fn = functools.partial(
      grouped_swiglu, block_expert=expert, used=used, limit=limit, impl=impl
    )
    out, pull = jax.vjp(fn, rows, gate_up)
    return out, pull(grad)

  for limit, (name, shape) in zip(
    (None, 5.0), grouped_shapes.TEST_WIDE.items()
  ):
    drawn = interpreted.draw_grouped_matmul(
      shape._replace(dim=128, out=2 * shape.out)
    )
    rows, gate_up, grad, *layout = drawn
    args = (rows, gate_up, grad[:, : shape.out], *layout)
    # The backward pass rounds the product before the activation.
    interpreted.compare(
      name, functools.partial(both, limit=limit), args, 2 * BF16
    )


def check_grouped_matmul_fp8():
  # More steps than stages of the ring, twice over.
  ring = {
    f'ring_{block}': grouped_shapes.Shape((70, 0, 130), 1152, 128, block)
    for block in (64, 128)
  }
  for name, shape in (grouped_shapes.TEST_WIDE | ring).items():
    drawn = interpreted.draw_grouped_matmul(shape)
    rows, weights, _, expert, used = drawn
    rng = np.random.default_rng(1)
    scales = lambda *size, rng=rng: jnp.asarray(
      rng.random(size) + 0.5, jnp.float32
    )
    E, D, F = weights.shape
    args = (
      rows.astype(jnp.float8_e4m3fn),
      scales(rows.shape[0], D // 128),
      weights.swapaxes(1, 2).astype(jnp.float8_e4m3fn),
      scales(E, F // 128, D // 128),
      expert,
    )
    op = functools.partial(grouped_matmul_fp8, used=used)
    interpreted.compare(name, op, args, BF16)


def check_grouped_matmul_float8():
  # An expert with more steps than stages of the ring.
  shape = grouped_shapes.Shape((700, 0, 5), 128, 256, 128)
  drawn = interpreted.draw_grouped_matmul(shape)
  interpreted.compare_grouped_matmul('ring', drawn, float8=True)


def check_swiglu_quantize():
  for name, shape in swiglu_shapes.TEST.items():
    how = {'limit': shape.limit, 'power_of_two': shape.power_of_two}
    for dtype in (jnp.float32, jnp.bfloat16):
      rng = np.random.default_rng(0)
      h = rng.normal(size=(shape.rows, 2 * shape.columns))
      h[1:][-1:] = 0
      h[0, :3] = h[0, -3:] = shape.limit or 0  # on the border of a limit
      h = jnp.asarray(h, dtype)
      grad = jnp.asarray(rng.normal(size=(shape.rows, shape.columns)), dtype)
      label = f'{name} {dtype.__name__}'
      # Where exp differs by a bit a number goes to the next one of float8.
      op = functools.partial(swiglu_quantize, **how)
      interpreted.compare(label, op, (h,), BF16)
      back = functools.partial(swiglu_gradient, **how)
      interpreted.compare(f'{label} gradient', back, (h, grad), BF16)


def check_permute_fp8():
  # Tiles of eight blocks, of four, and several parts of a row.
  for (name, shape), dim in zip(
    permute_shapes.TEST_GPU.items(), (1024, 512, 2048, 512, 4608), strict=True
  ):
    for power, dtype in ((False, jnp.bfloat16), (True, jnp.float32)):
      shape = shape._replace(dim=dim)
      plan, x, *_ = interpreted.draw_permute(shape, dtype)
      op = functools.partial(permute.permute_fp8, plan=plan, power_of_two=power)
      interpreted.compare(f'{name} {power}', op, (x,), 0)


if __name__ == '__main__':
  globals()['check_' + sys.argv[1]]()
