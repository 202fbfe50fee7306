"""Measures held-out loss: bits per byte of documents, each read by itself."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError, check_type, told
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel import processor
from deepseek_jax.parallel.sharding import Using, current
from deepseek_jax.train.cross_entropy import linear_cross_entropy


def negative_log_likelihood(
  hidden: jax.Array, head: jax.Array, batch: Mapping[str, jax.Array]
) -> jax.Array:
  """Returns the weighted -ln probability of a held-out batch's tokens.

  Args:
    hidden: [B T D].
    head: [D V].
    batch: of a data.Heldout, or arrays like it; padding weighs 0.
  """
  # Position t predicts token t + 1.
  real = batch['segments'][:, 1:] > 0
  return linear_cross_entropy(
    hidden.reshape(-1, hidden.shape[-1]),
    head,
    batch['tokens'][:, 1:].reshape(-1),
    jnp.where(real, batch['weights'], 0.0).reshape(-1),
  )


@functools.lru_cache(maxsize=8)
def _nll(model: Model, using: Using | None) -> Callable:
  """Returns the jitted nats of a batch: (variables, batch) -> scalar."""
  del using  # what is traced depends on it, which jit does not know

  def nll(variables: dict, batch: dict[str, jax.Array]) -> jax.Array:
    out = model.apply(
      variables,
      batch['tokens'][:, :-1],
      positions=batch['positions'][:, :-1],
      segment_ids=batch['segments'][:, :-1],
    )
    return negative_log_likelihood(out.hidden, model.head(variables), batch)

  how = processor.options('train', model.config.compute.xla)
  return jax.jit(nll, compiler_options=how)


def bits_per_byte(model: Model, variables: dict, heldout: Any) -> float:
  """Returns -log2 of the probability of all held-out tokens, over their bytes.

  Args:
    model, variables: the model.
    heldout: a data.Heldout.
  """
  check_type('model', model, Model, 'ds.build(config) makes one')
  if not hasattr(heldout, 'bits_per_byte'):
    raise InputError(
      f'heldout: is {told(heldout)}; give the held-out windows of a store, or'
      ' use ds.held_out(run)'
    )
  nll = _nll(model, current())
  return bits_per_byte_by(lambda batch: nll(variables, batch), heldout)


def bits_per_byte_by(nll: Callable[[dict], jax.Array], heldout: Any) -> float:
  """Returns `bits_per_byte` from the nats that `nll` gives for each batch."""
  total = 0.0
  for batch in heldout:
    # NumPy's, which jit may place on as many devices as the variables are on.
    arrays = {k: v for k, v in batch.items() if k != 'document'}
    total += float(nll(arrays))
  return heldout.bits_per_byte(total)
