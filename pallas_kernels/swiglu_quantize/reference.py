"""SwiGLU and its gradient in block-scaled float8, in XLA."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference as quantize

GROUP = 128


def activate(gate_up: jax.Array, limit: float | None) -> jax.Array:
  """Returns silu(gate) * up of the halves [M 2F], in float32."""
  gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
  if limit is not None:
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
  return jax.nn.silu(gate) * up


def forward(
  gate_up: jax.Array, limit: float | None, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns q [M F] and scales [M F/128]."""
  values = activate(gate_up, limit)
  return quantize.quantize(values, (1, GROUP), power_of_two, floor)


def gradient(
  gate_up: jax.Array, grad: jax.Array, limit: float | None, power_of_two: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """Returns the gradient [M 2F], and q and scales of it."""
  wide = gate_up.astype(jnp.float32)
  _, pull = jax.vjp(lambda h: activate(h, limit), wide)
  (found,) = pull(grad.astype(jnp.float32))
  found = found.astype(gate_up.dtype)
  return found, quantize.quantize(found, (1, GROUP), power_of_two, 0.0)
