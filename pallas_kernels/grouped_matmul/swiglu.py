"""Both halves of a SwiGLU in one grouped product on Hopper.

Gate and up columns of a tile are multiplied by the same rows and meet in the
registers, so that the product of width 2F is never stored.
Legend: M rows, E experts, D width in, F width out.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.grouped_matmul import gpu

COLUMNS = 128  # of the result, in a tile


def forward(
  rows: jax.Array,
  gate_up: jax.Array,
  block_expert: jax.Array,
  used: jax.Array,
  limit: float | None,
) -> jax.Array:
  """Returns silu(gate) * up [M F] of rows [M D] and gate_up [E D 2F]."""
  gpu.supported(rows, gate_up)
  (M, D), F = rows.shape, gate_up.shape[2] // 2
  block = M // block_expert.shape[0]
  # The backward pass needs D as the forward pass does F.
  if F % COLUMNS or D % COLUMNS:
    raise NotImplementedError(f'widths {D} and {F}, not multiples of {COLUMNS}')
  tile = gpu.Tile(gpu.tile_of(block, COLUMNS).rows, COLUMNS)
  memory = lambda *shape: plgpu.SMEM(
    shape, jnp.bfloat16, transforms=compat.TILED_16BIT
  )
  parts_a, parts_b = tile.parts
  return compat.kernel(
    functools.partial(_body, tile=tile, block=block, limit=limit),
    jax.ShapeDtypeStruct((M, F), rows.dtype),
    grid={'m': M // tile.rows, 'n': F // COLUMNS},
    threads=2,
    scratch={
      'a': memory(gpu.STAGES, parts_a, 64, gpu.STEP),
      'b': memory(gpu.STAGES, 2 * parts_b, gpu.STEP, tile.own_columns),
      'staged': memory(2, 64, tile.own_columns),
      'here': plgpu.Barrier(
        num_arrivals=parts_a + 2 * parts_b, num_barriers=gpu.STAGES
      ),
      'free': plgpu.Barrier(num_arrivals=2, num_barriers=gpu.STAGES),
    },
  )(rows, gate_up, block_expert, used[None])


def _body(
  rows: jax.Ref, gate_up: jax.Ref, block_expert: jax.Ref, used: jax.Ref,
  out: jax.Ref, a: jax.Ref, b: jax.Ref, staged: jax.Ref, here: jax.Ref,
  free: jax.Ref, *, tile: gpu.Tile, block: int, limit: float | None,
) -> None:  # fmt: skip
  """Computes one tile of gate and of up, and their SwiGLU."""
  m, n = lax.axis_index('m'), lax.axis_index('n')
  at = lax.div(m, block // tile.rows)
  expert = block_expert[at]
  part_a, part_b = gpu.part(tile)
  width, parts = tile.own_columns, tile.parts
  # Filler takes no step: its rows come out as zeros.
  steps = jnp.where(at < used[0], rows.shape[1] // gpu.STEP, 0)

  # Load: rows once; the columns of gate and of up lie F apart.
  def load(k: jax.Array, stage: jax.Array) -> None:
    inner = pl.ds(k * gpu.STEP, gpu.STEP)
    for i in range(parts[0]):
      where = pl.ds(m * tile.rows + i * 64, 64)
      plgpu.copy_gmem_to_smem(
        rows.at[where, inner], a.at[stage, i], here.at[stage]
      )
    for half in range(2):
      left = half * (gate_up.shape[2] // 2) + n * COLUMNS
      for i in range(parts[1]):
        plgpu.copy_gmem_to_smem(
          gate_up.at[expert, inner, pl.ds(left + i * width, width)],
          b.at[stage, half * parts[1] + i],
          here.at[stage],
        )

  def run(gate: jax.Ref, up: jax.Ref) -> tuple[jax.Array, jax.Array]:
    def multiply(stage: jax.Array) -> None:
      # Matmul: the same rows by gate and by up.
      for half, ref in enumerate((gate, up)):
        right = b.at[stage, half * parts[1] + part_b]
        compat.wgmma(ref, a.at[stage, part_a], right)

    gpu.ring(steps, load, multiply, here, free, products=2)
    return gate[...], up[...]

  acc = plgpu.ACC((64, width), jnp.float32)
  gate, up = pl.run_scoped(run, acc, acc)
  # Activation: the same columns of gate and up meet in registers.
  if limit is not None:
    gate = jnp.minimum(gate, limit)
    up = jnp.minimum(jnp.maximum(up, -limit), limit)
  top, left = m * tile.rows + part_a * 64, n * COLUMNS + part_b * width
  # Store: F columns, so half of what was multiplied.
  gpu.store(
    gate / (1.0 + jnp.exp(-gate)) * up,
    lambda columns: out.at[
      pl.ds(top, 64), pl.ds(left + columns.start, columns.size)
    ],
    staged,
    width,
  )
