"""Moves the up-projections of latents into queries and into outputs.

So all heads share one key and value of C + R numbers (the absorbed form,
arXiv:2405.04434 section 2.1.2): cheap where queries are few.
Legend: B batch, T queries, H heads, C key-value latent, N no-rope dim, V value
dim.
"""

import jax

from deepseek_jax.parallel import products
from pallas_kernels import target


def into_queries(qn: jax.Array, k_up: jax.Array) -> jax.Array:
  """Returns no-rope queries [B T H N] as of latents: [B T H C].

  Args:
    qn: [B T H N].
    k_up: [C H N].
  """
  return products.einsum('BTHN,HCN->BTHC', qn, _by_heads(k_up, (1, 0, 2)))


def into_values(mixed: jax.Array, v_up: jax.Array) -> jax.Array:
  """Returns the heads' values [B T H V] of their latents.

  Args:
    mixed: [B T H C], means of latents.
    v_up: [C H V].
  """
  return products.einsum('BTHC,HVC->BTHV', mixed, _by_heads(v_up, (1, 2, 0)))


def _by_heads(up: jax.Array, axes: tuple[int, int, int]) -> jax.Array:
  """Returns an up-projection with the heads first.

  Products by heads want it so. XLA:CPU does that in every step of a loop,
  unless something stands between that is worth being moved out of it.
  """
  turned = up.transpose(axes)
  if target.current().platform != 'cpu':
    return turned
  return jax.lax.optimization_barrier(turned)
