"""The norm of a gradient by block: which layers a bad update came from."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def block_norms(tree: Mapping) -> dict[str, jax.Array]:
  """Euclidean norms of the parts of a gradient; their squares add up to its.

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
          norms[f'{name}.{i}.{j}'] = _norm(block, stacked=True)
    elif name == 'mtp':
      for k, block in part.items():
        norms[f'{name}.{k}'] = _norm(block)
    else:
      norms[name] = _norm(part)
  return norms


def _norm(part, *, stacked: bool = False) -> jax.Array:
  squares = (jnp.square(a.astype(jnp.float32)) for a in jax.tree.leaves(part))
  axes = lambda a: tuple(range(int(stacked), a.ndim))
  return jnp.sqrt(sum(a.sum(axis=axes(a)) for a in squares))
