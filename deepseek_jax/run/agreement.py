"""Compares what all processes of a run must share, before the first step.

Processes of different configurations or texts would hang in a collective, or
train on another run's data without a sign of it.
"""

import json
import platform
from collections.abc import Mapping

import jax

from deepseek_jax.errors import InputError
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.run.checkpoint import flatten
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.folder import as_json, code_of
from deepseek_jax.run.sources import Store

_SHOWN = 3


def check_config(config: RunConfig) -> None:
  """Compares the whole configuration, and JAX's version, with process 0's.

  Fields that may differ when a run goes on may not differ between processes.

  Raises:
    InputError: names the first fields that differ, in the process that differs.
  """
  mine = flatten(as_json(config) | code_of(config))
  mine |= {"JAX's version": jax.__version__}
  lines = _compared(mine)
  if lines:
    raise InputError(
      f'process {jax.process_index()} has another configuration than process 0'
      f' ({"; ".join(lines[:_SHOWN])}): start all processes with the same'
      ' command and the same packages'
    )
  distributed.wait_for_all()  # none writes before all agree


def check_data(config: RunConfig, store: Store) -> None:
  """Compares the text that is trained and validated on, and the tokenizer.

  Raises:
    InputError: names what differs, in the process that differs.
  """
  mine = {
    'training text': store.train_sha256,
    'held-out text': store.heldout_sha256,
    'tokenizer': store.index['tokenizer']['sha256'],
  }
  python = platform.python_version()
  theirs = json.loads(distributed.text_from_first(json.dumps([mine, python])))
  lines = _differences(theirs[0], mine)
  if lines:
    hint = ''
    if config.data.path == 'stdlib':
      hint = (
        f' (stdlib is that of Python {theirs[1]} in process 0 and of {python}'
        f' in process {jax.process_index()})'
      )
    raise InputError(
      f'data.path = {config.data.path!r}: process {jax.process_index()} reads'
      f' another text than process 0 ({"; ".join(lines)}); give all processes'
      f' the same files{hint}'
    )
  distributed.wait_for_all()


def _compared(mine: Mapping) -> list[str]:
  """Returns a line for each name whose value process 0 has otherwise."""
  text = distributed.text_from_first(json.dumps(mine))
  return _differences(json.loads(text), mine)


def _differences(theirs: Mapping, mine: Mapping) -> list[str]:
  """Returns one line for each name whose value differs in process 0."""
  # As text, for NaN does not equal itself.
  show = lambda values, name: json.dumps(values.get(name))
  return [
    f'{name}: {show(theirs, name)} in process 0, {show(mine, name)} in process'
    f' {jax.process_index()}'
    for name in dict.fromkeys([*theirs, *mine])
    if show(theirs, name) != show(mine, name)
  ]
