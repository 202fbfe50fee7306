"""Held-out loss: bits per byte of documents, each read by itself."""

import functools
from collections.abc import Callable

import jax

from deepseek_jax.losses import linear_cross_entropy
from deepseek_jax.sharding import Using, current
from deepseek_jax.transformer import Model


@functools.lru_cache(maxsize=8)
def _nll(model: Model, using: Using | None) -> Callable:
  del using  # what is traced depends on it, which jit does not know

  def nll(variables, batch):
    out = model.apply(
      variables,
      batch['tokens'][:, :-1],
      positions=batch['positions'][:, :-1],
      segment_ids=batch['segments'][:, :-1],
    )
    return linear_cross_entropy(
      out.hidden.reshape(-1, out.hidden.shape[-1]),
      model.head(variables),
      batch['tokens'][:, 1:].reshape(-1),
      batch['weights'].reshape(-1),
    )

  return jax.jit(nll)


def bits_per_byte(model: Model, variables: dict, heldout) -> float:
  """-log2 of the probability of all held-out tokens, over their bytes.

  Args:
    model, variables: the model.
    heldout: a data.Heldout.
  """
  total = 0.0
  for batch in heldout:
    # NumPy's, which jit may place on as many devices as the variables are on.
    arrays = {k: v for k, v in batch.items() if k != 'document'}
    total += float(_nll(model, current())(variables, arrays))
  return heldout.bits_per_byte(total)
