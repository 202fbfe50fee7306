"""Flight recorder of the routing: what each expert got, over a whole run.

Arrays of one step (load, bias, ...) are reduced over intervals of steps. When
the intervals exceed the capacity, neighbours are merged in pairs and intervals
become twice as long: a run of any length leaves one small file, in which all
intervals but the last hold the same number of records. Large arrays (pairs of
experts) have fewer and longer intervals of their own.

MaxVio is from Wang et al. 2024, arXiv:2408.15664, section 4.1.
Legend: N intervals, L MoE layers, E experts, G groups of neighbouring experts.
"""

import dataclasses
import json
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax import files
from deepseek_jax.errors import InputError

_ACCUMULATE = {
  'sum': np.add,
  'mean': np.add,  # divided by the records when read
  'max': np.maximum,
  'min': np.minimum,
  'last': lambda old, new: new,
}


_COARSE = '_coarse_'


class DamagedFile(InputError):
  """The file cannot be read, or is not one of a FlightRecorder."""

  def __init__(self, path: str | os.PathLike, reason: str):
    super().__init__(f'{path} is damaged ({reason}); remove it')
    self.reason = reason


class Flight(NamedTuple):
  """A recorded run, oldest interval first."""

  first: np.ndarray  # [N] i64, first recorded step of the interval
  last: np.ndarray  # [N] i64, last recorded step
  records: np.ndarray  # [N] i64, records reduced into the interval
  layers: np.ndarray  # [L] i64, what the layers are called
  arrays: dict[str, np.ndarray]  # name -> [N ...], reduced
  coarse: 'Flight | None' = None  # the large arrays, in longer intervals


class FlightRecorder:
  """Records routing arrays into one bounded file.

  Args:
    path: the .npz file; written by `save` alone.
    reduce: array name -> how steps of an interval combine: 'sum' (counts),
      'mean', 'max', 'min', or 'last' (state).
    capacity: most intervals kept; even.
    layers: numbers of the recorded layers; None counts from 0.
    resume_step: the step that the run continues from: intervals that reach
      beyond it are dropped (-1 drops all). None continues what is there. Save
      at each checkpoint, and a resumed run's file equals the straight run's.
    coarse: as `reduce`, for large arrays.
    coarse_capacity: most intervals kept of these; even.
    shapes: array name -> its shape in every record, where that is known.

  Raises:
    InputError: a wrong argument, or the file was recorded with other settings.
    DamagedFile: the file cannot be read.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    reduce: Mapping[str, str],
    *,
    capacity: int = 256,
    layers: Sequence[int] | None = None,
    resume_step: int | None = None,
    coarse: Mapping[str, str] | None = None,
    coarse_capacity: int = 8,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
  ):
    _check(reduce, capacity)
    self._path = Path(path)
    self._shapes = dict(shapes or {})
    self._layers = None if layers is None else [int(l) for l in layers]
    self._tracks = [_Track('_', dict(reduce), capacity)]
    if coarse:
      _check(coarse, coarse_capacity)
      self._tracks.append(_Track(_COARSE, dict(coarse), coarse_capacity))
    if self._path.exists() and resume_step != -1:
      self._restore(resume_step)

  def record(self, step: int, **arrays: Any):
    """Adds one step, or the steps since the last record, already reduced.

    Args:
      step: completed steps, more than in the call before.
      **arrays: every name of `reduce` and `coarse`, each of constant shape.
        The first axis is layers and the second experts: [L E], [L], [] or
        [L E ...].

    Raises:
      InputError: names or shapes differ from before, or the step goes back.
    """
    step = operator.index(step)
    arrays = self._checked(step, arrays)
    for track in self._tracks:
      track.add(step, {name: arrays[name] for name in track.reduce})

  def save(self):
    """Writes the file; a crash meanwhile leaves the old one whole."""
    if not self._tracks[0].intervals:
      return
    settings, columns = {'layers': self._layers}, {}
    for track in self._tracks:
      settings |= track.settings()
      columns |= track.columns()
    text = json.dumps(settings).encode()
    columns['_settings'] = np.frombuffer(text, np.uint8)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(self._path) as scratch, scratch.open('wb') as file:
      np.savez_compressed(file, **columns)
      file.flush()
      os.fsync(file.fileno())

  def _checked(self, step: int, arrays: dict[str, Any]):
    reduce = {n: how for t in self._tracks for n, how in t.reduce.items()}
    if arrays.keys() != reduce.keys():
      raise InputError(
        f'record got arrays {sorted(arrays)}: pass {sorted(reduce)},'
        ' the names in reduce'
      )
    arrays = {
      name: _widen(np.asarray(arrays[name]), how)
      for name, how in reduce.items()
    }
    latest = [t.intervals[-1] for t in self._tracks if t.intervals]
    if latest and step <= latest[0].last:
      raise InputError(
        f'step={step} comes after step {latest[0].last}: pass'
        f' resume_step={step - 1} to FlightRecorder to drop what is later'
      )
    before = {n: a.shape for i in latest for n, a in i.arrays.items()}
    for name, array in arrays.items():
      shape = before.get(name, array.shape)
      if array.shape != shape:
        raise InputError(
          f'{name} has shape {array.shape}: it was recorded as {shape},'
          ' and must stay so'
        )
      named = self._layers is not None and array.ndim
      if named and array.shape[0] != len(self._layers):
        raise InputError(
          f'{name} has {array.shape[0]} layers, but layers={self._layers}:'
          ' name every recorded layer'
        )
    return arrays

  def _restore(self, resume_step: int | None):
    settings, columns = _load(self._path)
    wanted = {'layers': self._layers}
    for track in self._tracks:
      wanted |= track.settings()
    for name in [n for n in wanted if not n.endswith('width')]:
      if settings.get(name) != wanted[name]:
        raise InputError(
          f'{self._path} was recorded with {name}={settings.get(name)}, not'
          f' {wanted[name]}: keep it, or record to another file'
        )
    for name, shape in self._shapes.items():
      if columns[name].shape[1:] != tuple(shape):
        raise InputError(
          f'{self._path} was recorded with {name} of shape'
          f' {columns[name].shape[1:]}, not {tuple(shape)}: keep it, or record'
          ' to another file'
        )
    for track in self._tracks:
      track.restore(settings, columns, resume_step)


class _Interval(NamedTuple):
  first: int
  last: int
  records: int
  arrays: dict[str, np.ndarray]


@dataclasses.dataclass
class _Track:
  """Arrays that share their intervals.

  Attributes:
    prefix: of its names in the file.
    width: records per interval.
  """

  prefix: str
  reduce: dict[str, str]
  capacity: int
  width: int = 1
  intervals: list[_Interval] = dataclasses.field(default_factory=list)

  def add(self, step: int, arrays: dict[str, np.ndarray]):
    new = _Interval(step, step, 1, arrays)
    if self.intervals and self.intervals[-1].records < self.width:
      self.intervals[-1] = _merge(self.intervals[-1], new, self.reduce)
      return
    if len(self.intervals) == self.capacity:
      halves = zip(self.intervals[::2], self.intervals[1::2])
      self.intervals = [_merge(a, b, self.reduce) for a, b in halves]
      self.width *= 2
    self.intervals.append(new)

  def settings(self) -> dict[str, Any]:
    named = {'reduce': self.reduce, 'capacity': self.capacity}
    named['width'] = self.width
    return {self.prefix[1:] + name: value for name, value in named.items()}

  def columns(self) -> dict[str, np.ndarray]:
    columns = {
      self.prefix + name: np.array(
        [getattr(i, name) for i in self.intervals], np.int64
      )
      for name in ('first', 'last', 'records')
    }
    for name in self.reduce:
      columns[name] = np.stack([i.arrays[name] for i in self.intervals])
    return columns

  def restore(self, settings, columns, resume_step: int | None):
    self.width = settings[self.prefix[1:] + 'width']
    first, last, records = (
      columns[self.prefix + name] for name in ('first', 'last', 'records')
    )
    for n in range(len(last)):
      if resume_step is None or last[n] <= resume_step:
        arrays = {name: columns[name][n] for name in self.reduce}
        self.intervals.append(
          _Interval(int(first[n]), int(last[n]), int(records[n]), arrays)
        )


def _merge(a: _Interval, b: _Interval, reduce: Mapping[str, str]) -> _Interval:
  arrays = {
    name: _ACCUMULATE[how](a.arrays[name], b.arrays[name])
    for name, how in reduce.items()
  }
  return _Interval(a.first, b.last, a.records + b.records, arrays)


def _widen(array: np.ndarray, how: str) -> np.ndarray:
  """Sums stay exact: counts in 64-bit integers, the rest in float64."""
  if how == 'sum' and array.dtype.kind in 'biu':
    return array.astype(np.int64)
  if how in ('sum', 'mean'):
    return array.astype(np.float64)
  # A copy, for the caller may reuse the buffer; bfloat16 has no npz type.
  return array.astype(array.dtype if array.dtype.kind in 'biuf' else np.float32)


def _check(reduce: Mapping[str, str], capacity: int):
  for name, how in reduce.items():
    if how not in _ACCUMULATE:
      raise InputError(
        f'reduce[{name!r}]={how!r}: choose one of {sorted(_ACCUMULATE)}'
      )
    if name.startswith('_'):
      raise InputError(f'reduce[{name!r}]: a name may not start with _')
  if not reduce:
    raise InputError('reduce={} records nothing: name at least one array')
  if capacity < 2 or capacity % 2:
    raise InputError(
      f'capacity={capacity}: intervals merge in pairs, choose an even number'
    )


def _load(path: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
  """Settings and columns of a file.

  Raises:
    DamagedFile: it cannot be read, or holds something else.
    OSError: it is not there, or may not be read.
  """
  try:
    with open(path, 'rb') as stream:  # np.load would leave a damaged one open
      file = np.load(stream, allow_pickle=False)
      columns = {name: file[name] for name in file.files}
    settings = json.loads(columns.pop('_settings').tobytes())
    for prefix in ('_', *([_COARSE] if 'coarse_reduce' in settings else [])):
      _check_columns(prefix, settings, columns)
  except OSError:
    raise
  # Damaged bytes raise anything: of zip, zlib, NumPy's header, Python's parser.
  except Exception as error:
    what = ' '.join(str(error).split())[:80] or 'cut short'
    raise DamagedFile(path, f'{type(error).__name__}: {what}') from None
  return settings, columns


def _check_columns(prefix: str, settings: dict, columns: dict):
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
    if how not in _ACCUMULATE or array.dtype.kind not in 'biuf':
      raise ValueError(f'{name} is {how!r} of {array.dtype}')
    if array.shape[:1] != last.shape:
      raise ValueError(f'{name} has {array.shape[:1]} intervals')


def load(path: str | os.PathLike) -> Flight:
  """Reads a recorded file; means are float64, sums of counts int64.

  Raises:
    DamagedFile: it cannot be read.
  """
  settings, columns = _load(path)
  fine = _part('_', settings, columns)
  if _COARSE[1:] + 'reduce' not in settings:
    return fine
  return fine._replace(coarse=_part(_COARSE, settings, columns))


def _part(prefix: str, settings, columns) -> Flight:
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
    layers = range(max(counts, default=0))
  return Flight(first, last, records, np.array(layers, np.int64), arrays)


def table(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """A recorded file as columns of one length, one row per N, L and E.

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
  """The large arrays as columns, one row per N, L, G and G.

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
  column = column.reshape(column.shape + (1,) * (len(shape) - column.ndim))
  return np.broadcast_to(column, shape).reshape(-1).copy()


def max_violation(load: Any) -> np.ndarray:
  """MaxVio: how far the busiest expert exceeds an even share.

  max_e load_e / mean_e load_e - 1; 0 is balance, E - 1 is one expert for all.

  Args:
    load: tokens per expert, [... E].

  Returns:
    [...] float64; NaN where no token was routed.
  """
  load = np.asarray(load, np.float64)
  # E max / total, not max / mean: exactly 0 when the shares are equal.
  return _over_total(load.max(-1) * load.shape[-1], load.sum(-1)) - 1


def load_entropy(load: Any) -> np.ndarray:
  """Entropy of the load over its largest value log E: 1 is balance.

  Args:
    load: tokens per expert, [... E].

  Returns:
    [...] float64 in [0, 1]; NaN where no token was routed; 1 for E = 1.
  """
  load = np.asarray(load, np.float64)
  share = _over_total(load, load.sum(-1, keepdims=True))
  if load.shape[-1] == 1:
    return share[..., 0]
  terms = share * np.log(np.where(share > 0, share, 1))
  # The clip takes away rounding alone.
  return np.clip(-terms.sum(-1) / np.log(load.shape[-1]), 0, 1)


def _over_total(part: np.ndarray, total: np.ndarray) -> np.ndarray:
  return np.divide(part, total, out=np.full_like(part, np.nan), where=total > 0)
