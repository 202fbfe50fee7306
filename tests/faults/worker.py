"""A tiny run as a process of its own, for what only a process can suffer.

    python -m tests.faults.worker --home=... --workdir=...

Ends with one JSON line: the SHA-256 of the final state (process 0), and of each
row of every batch that this process read.
"""

import contextlib
import json
import signal
import time
from pathlib import Path
from unittest import mock

from absl import flags

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.cli import common, process_flags
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.record import last_steps
from deepseek_jax.run import fit as loop
from deepseek_jax.run import steps as step
from tests.faults import runs
from tests.faults.rollouts_task import fingerprint

_HOME = flags.DEFINE_string('home', None, 'Corpus and compiled programs.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run.')
_STEPS = flags.DEFINE_integer('steps', 8, 'Steps of the run.')
_EVERY = flags.DEFINE_integer('every', 3, 'Steps between checkpoints.')
_PAUSE = flags.DEFINE_float('pause', 0.0, 'Seconds before each step.')
_HANG = flags.DEFINE_integer('hang', None, 'The step that never ends.')
_CHANGE = flags.DEFINE_multi_string(
  'change', [], 'field=value of the configuration, the value as in JSON.'
)
_SLOW = flags.DEFINE_string('slow', None, 'Stops for long in this function.')
_DEFECT = flags.DEFINE_integer('defect', None, 'The step that raises.')
_LATE = flags.DEFINE_bool('late', False, 'Finds a fault after the end.')
_ALL = flags.DEFINE_bool('all_devices', False, 'One process uses all, too.')


def stuck_in_a_collective():
  time.sleep(300)


def slow(*args, **more):
  print('stuck', flush=True)
  time.sleep(300)


def hanging(steps, state, batch, writer):
  if _DEFECT.value and int(state.step) + 1 == _DEFECT.value:
    raise RuntimeError('a defect')
  if _HANG.value and int(state.step) + 1 == _HANG.value:
    stuck_in_a_collective()
  return _STEP(steps, state, batch, writer)


_STEP = step.Steps.__call__


def main(argv):
  del argv
  home, seen = Path(_HOME.value), []
  original = datalib.Batches.next

  def noted(batches, *args):
    time.sleep(_PAUSE.value)
    batch = original(batches, *args)
    rows = batch['tokens'][:, None]
    seen.append([last_steps.digest({'tokens': row}) for row in rows])
    return batch

  made = runs.config(
    home,
    _STEPS.value,
    checkpoint_every=_EVERY.value,
    **{'safety.hang_seconds': 5.0},
  )
  changes = [change.partition('=') for change in _CHANGE.value]
  made = ds.changed(made, {n: json.loads(value) for n, _, value in changes})
  places = {'build': datalib, 'choose': placement}
  stuck = contextlib.nullcontext()
  if _SLOW.value:
    stuck = mock.patch.object(places[_SLOW.value], _SLOW.value, slow)
  choose = placement.over_all_devices if _ALL.value else placement.choose
  with (
    mock.patch.object(datalib.Batches, 'next', noted),
    mock.patch.object(placement, 'choose', choose),
    mock.patch.object(step.Steps, '__call__', hanging),
    stuck,
  ):
    run = loop.fit(made, _WORKDIR.value)
  state = placement.to_first(run.state)
  if _LATE.value:
    raise InputError('late')
  done = {'batches': seen}
  if distributed.first():
    done['state'] = fingerprint(state)
  print(json.dumps(done), flush=True)


if __name__ == '__main__':
  # As from a terminal, also where the tests run under nohup.
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
  common.launch(main, join=process_flags.join)
