"""Reads the file that a FlightRecorder left: what each expert got.

Legend: N intervals, L MoE layers, E experts, G groups of neighbouring experts.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.errors import InputError

ACCUMULATE = {
  'sum': np.add,
  'mean': np.add,  # divided by the records when read
  'max': np.maximum,
  'min': np.minimum,
  'last': lambda old, new: new,
}


COARSE = '_coarse_'


class DamagedFile(InputError):
  """Reports a file that cannot be read, or is not one of a FlightRecorder.

  Attributes:
    reason: what is wrong with it, in a few words.
  """

  def __init__(self, path: str | os.PathLike, reason: str):
    super().__init__(f'{path} is damaged ({reason}); remove it')
    self.reason = reason


class Flight(NamedTuple):
  """Holds a recorded run, oldest interval first."""

  first: np.ndarray  # [N] i64, first recorded step of the interval
  last: np.ndarray  # [N] i64, last recorded step
  records: np.ndarray  # [N] i64, records reduced into the interval
  layers: np.ndarray  # [L] i64, what the layers are called
  arrays: dict[str, np.ndarray]  # name -> [N ...], reduced
  coarse: 'Flight | None' = None  # the large arrays, in longer intervals


def load_columns(path: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
  """Returns settings and columns of a file.

  Raises:
    DamagedFile: it cannot be read, or holds something else.
    OSError: it is not there, or may not be read.
  """
  try:
    with open(path, 'rb') as stream:  # np.load would leave a damaged one open
      file = np.load(stream, allow_pickle=False)
      columns = {name: file[name] for name in file.files}
    settings = json.loads(columns.pop('_settings').tobytes())
    for prefix in ('_', *([COARSE] if 'coarse_reduce' in settings else [])):
      _check_columns(prefix, settings, columns)
  except OSError:
    raise
  # Damaged bytes raise anything: of zip, zlib, NumPy's header, Python's parser.
  except Exception as error:
    what = ' '.join(str(error).split())[:80] or 'cut short'
    raise DamagedFile(path, f'{type(error).__name__}: {what}') from None
  return settings, columns


def _check_columns(prefix: str, settings: dict, columns: dict) -> None:
  """Raises ValueError or KeyError unless a track's columns fit each other."""
  width, reduce = (settings[prefix[1:] + n] for n in ('width', 'reduce'))
  first, last, records = (
    columns[prefix + name] for name in ('first', 'last', 'records')
  )
  counts = (first, last, records)
  sound = all(c.dtype == np.int64 and c.shape == (len(last),) for c in counts)
  if not sound or (first > last).any() or (records < 1).any():
    raise ValueError('its intervals are not those of a record')
  if not isinstance(width, int) or width < 1 or (records > width).any():
    raise ValueError(f'its intervals are of {width!r} records')
  for name, how in reduce.items():
    array = columns[name]
    if how not in ACCUMULATE or array.dtype.kind not in 'biuf':
      raise ValueError(f'{name} is {how!r} of {array.dtype}')
    if array.shape[:1] != last.shape:
      raise ValueError(f'{name} has {array.shape[:1]} intervals')


def load(path: str | os.PathLike) -> Flight:
  """Reads routing.npz, or that of a run's folder.

  Means are float64, sums of counts int64.

  Raises:
    InputError: it is not there.
    DamagedFile: it cannot be read.
  """
  path = os.path.join(path, 'routing.npz') if os.path.isdir(path) else path
  if not os.path.exists(path):
    raise InputError(f'{path}: no such file; name a run, or its routing.npz')
  settings, columns = load_columns(path)
  fine = _part('_', settings, columns)
  if COARSE[1:] + 'reduce' not in settings:
    return fine
  return fine._replace(coarse=_part(COARSE, settings, columns))


def _part(
  prefix: str, settings: Mapping[str, Any], columns: Mapping[str, np.ndarray]
) -> Flight:
  """Returns the arrays of one track; sums become the means they stand for."""
  first, last, records = (
    columns[prefix + name] for name in ('first', 'last', 'records')
  )
  arrays = {}
  for name, how in settings[prefix[1:] + 'reduce'].items():
    arrays[name] = array = columns[name]
    if how == 'mean':
      arrays[name] = array / records.reshape(-1, *[1] * (array.ndim - 1))
  layers = settings['layers']
  if layers is None:
    counts = [a.shape[1] for a in arrays.values() if a.ndim > 1]
    # Without names, layers count from 0; arrays [N] have none.
    layers = range(max(counts, default=0))
  return Flight(first, last, records, np.array(layers, np.int64), arrays)


def table(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns a recorded file as columns of one length, one row per N, L and E.

  Columns: first_step, last_step, records, layer, expert, then every array. An
  array without an expert or layer axis is repeated; one with further axes
  (pairs of experts) has no place in the table: see `pairs`.
  """
  flight = load(path)
  flat = {k: a for k, a in flight.arrays.items() if a.ndim <= 3}
  E = max((a.shape[2] for a in flat.values() if a.ndim == 3), default=1)
  shape = len(flight.last), max(len(flight.layers), 1), E
  layers = flight.layers if len(flight.layers) else np.zeros(1, np.int64)
  columns = {
    'first_step': flight.first,
    'last_step': flight.last,
    'records': flight.records,
    'layer': layers[None],
    'expert': np.arange(E)[None, None],
    **flat,
  }
  return {k: _spread(column, shape) for k, column in columns.items()}


def pairs(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Returns the large arrays as columns, one row per N, L, G and G.

  Columns: first_step, last_step, records, layer, group, other, then every
  array, such as 'together': how often a token chose of both groups of experts.
  Empty if none was recorded.
  """
  run = load(path).coarse
  flat = {k: a for k, a in run.arrays.items() if a.ndim == 4} if run else {}
  if not flat:
    return {}
  shape = next(iter(flat.values())).shape
  columns = {
    'first_step': run.first,
    'last_step': run.last,
    'records': run.records,
    'layer': run.layers[None],
    'group': np.arange(shape[2])[None, None],
    'other': np.arange(shape[3])[None, None, None],
    **flat,
  }
  return {k: _spread(column, shape) for k, column in columns.items()}


def _spread(column: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Repeats a column over the axes of `shape` that it lacks: [rows]."""
  column = column.reshape(column.shape + (1,) * (len(shape) - column.ndim))
  return np.broadcast_to(column, shape).reshape(-1).copy()
