"""Measures a run on held-out text, beside what it has to beat."""

from typing import Any

from deepseek_jax import data as datalib
from deepseek_jax.errors import InputError, told
from deepseek_jax.run.fit import Run
from deepseek_jax.train import evaluate


def held_out(run: Run) -> dict[str, Any] | None:
  """Returns bits per byte of the model and of what it has to beat.

  Args:
    run: as `fit` returns it, of a run that reads text.

  Returns:
    'bits_per_byte', 'baselines' by name, and the 'documents', 'tokens' and
    'bytes' that they are of; None where nothing is held out.

  Raises:
    InputError: it is no such run, or learns from conversations or a task.
  """
  if not hasattr(run, 'store'):
    raise InputError(f'run: is {told(run)}; give what ds.fit returned')
  config = run.config
  if not isinstance(run.store, datalib.TokenStore):
    raise InputError(
      'held_out: this run reads no text; what it holds out is measured while it'
      ' trains, see evaluate.every and ds.read_metrics'
    )
  if not run.store.heldout_documents():
    return None
  heldout = datalib.Heldout(
    run.store,
    config.data.seq_len,
    config.evaluate.batch,
    stride=config.evaluate.stride,
  )
  return {
    'bits_per_byte': evaluate.bits_per_byte(run.model, run.variables, heldout),
    'baselines': datalib.bits_to_beat(heldout, run.store.vocab_size),
    'documents': len(heldout.documents),
    'tokens': heldout.tokens,
    'bytes': heldout.bytes,
  }
