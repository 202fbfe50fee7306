"""Grouped matmul in XLA: a loop over blocks, each times its expert."""

import jax
import jax.numpy as jnp


def blocks_of(rows, block_expert):
  return rows.reshape(block_expert.shape[0], -1, rows.shape[-1])


def forward(rows, weights, block_expert, transpose):
  """rows [M D], weights [E D F] (or [E F D] with transpose) -> [M F]."""
  F = weights.shape[1 if transpose else 2]
  contract = ((1,), (1 if transpose else 0,))

  def block(args):
    x, e = args
    w = jax.lax.dynamic_index_in_dim(weights, e, keepdims=False)
    y = jax.lax.dot_general(
      x, w, (contract, ((), ())), preferred_element_type=jnp.float32
    )
    return y.astype(rows.dtype)

  out = jax.lax.map(block, (blocks_of(rows, block_expert), block_expert))
  return out.reshape(rows.shape[0], F)


def outer(rows, grads, block_expert, num_experts):
  """Sum over each expert's rows of rows.T @ grads: [E D F], float32."""

  def step(total, args):
    x, g, e = args
    part = jax.lax.dot_general(
      x, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return total.at[e].add(part), None

  zero = jnp.zeros((num_experts, rows.shape[1], grads.shape[1]), jnp.float32)
  blocks = (blocks_of(rows, block_expert), blocks_of(grads, block_expert))
  return jax.lax.scan(step, zero, (*blocks, block_expert))[0]
