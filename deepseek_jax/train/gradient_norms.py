"""Computes norms of a gradient at any scale, the whole and by block.

Gradients have no natural size, and their squares leave float32 below 1e-19 and
above 1e19; so numbers are brought near 1 first, by powers of two: exactly. By
block they show which layers a bad update came from.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def gain(top: jax.Array) -> jax.Array:
  """Returns the power of two that brings a magnitude to 1..4, float32.

  It is 0 for what is smaller than float32's least normal number. Infinity and
  NaN stay what they are under it.
  """
  least, most = 1 << 23, 253 << 23  # exponents of normal inverses
  bits = jax.lax.bitcast_convert_type(top.astype(jnp.float32), jnp.int32)
  exponent = jnp.minimum(bits & 0x7F800000, most)
  power = jax.lax.bitcast_convert_type((254 << 23) - exponent, jnp.float32)
  return jnp.where(exponent < least, 0.0, power)


# Blocks that are alike are traced once.
@functools.partial(jax.jit, static_argnames='stacked')
def tree_norm(tree: Any, *, stacked: bool = False) -> jax.Array:
  """Returns the Euclidean norm of all numbers of a tree, float32.

  f(s x) is s f(x) for every power of two s that keeps the result and the
  largest number normal; below that it is 0.

  Args:
    tree: of arrays; none gives 0.
    stacked: one norm for each slice along the arrays' first axis, which agree.
  """
  leaves = [
    a.astype(jnp.float32) for a in map(jnp.asarray, jax.tree.leaves(tree))
  ]
  if not leaves:
    return jnp.float32(0)
  axes = lambda a: tuple(range(stacked, a.ndim))
  # One factor for all leaves, by the largest number of the tree.
  tops = [jnp.abs(a).max(axis=axes(a), initial=0.0) for a in leaves]
  factor = gain(functools.reduce(jnp.maximum, tops))
  wide = lambda a: factor.reshape(factor.shape + (1,) * (a.ndim - factor.ndim))
  # Squares near 1 neither underflow nor overflow.
  squares = (jnp.square(a * wide(a)).sum(axis=axes(a)) for a in leaves)
  root = jnp.sqrt(sum(squares))
  # Division by a power of two is exact. Of a factor of 0 the root is 0 or NaN:
  # XLA's maximum of many numbers on a CPU leaves NaN out, their sum does not.
  return root / jnp.where(factor > 0, factor, 1.0)


def block_norms(tree: Mapping) -> dict[str, jax.Array]:
  """Returns the norms of a gradient's blocks; their squares add up to its.

  Args:
    tree: shaped as a model's parameters.

  Returns:
    'segments.i.j' -> [R], of the block in place j of segment i, one for each
    of its R repeats; 'mtp.k' and 'embed', 'head', ... -> []; float32.
  """
  norms = {}
  for name, part in tree.items():
    if name == 'segments':
      for i, pattern in part.items():
        for j, block in pattern.items():
          norms[f'{name}.{i}.{j}'] = tree_norm(block, stacked=True)
    elif name == 'mtp':
      for k, block in part.items():
        norms[f'{name}.{k}'] = tree_norm(block)
    else:
      norms[name] = tree_norm(part)
  return norms
