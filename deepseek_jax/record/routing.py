"""Records the routing of a whole run: what each expert got.

Arrays of one step (load, bias, ...) are reduced over intervals of steps. When
the intervals exceed the capacity, neighbours are merged in pairs and intervals
become twice as long: a run of any length leaves one small file, in which all
intervals but the last hold the same number of records. Large arrays (pairs of
experts) have fewer and longer intervals of their own. flight.py reads the file.
Legend: L MoE layers, E experts.
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
from deepseek_jax.record.flight import ACCUMULATE, COARSE, load_columns


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
      self._tracks.append(_Track(COARSE, dict(coarse), coarse_capacity))
    if self._path.exists() and resume_step != -1:
      self._restore(resume_step)

  def record(self, step: int, **arrays: Any) -> None:
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

  def save(self) -> None:
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

  def _checked(
    self, step: int, arrays: dict[str, Any]
  ) -> dict[str, np.ndarray]:
    """Returns the arrays of a record in the dtypes that are kept.

    Raises:
      InputError: names or shapes differ from before, or the step goes back.
    """
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

  def _restore(self, resume_step: int | None) -> None:
    """Reads the file, up to `resume_step`.

    Raises:
      InputError: it was recorded with other settings or shapes.
      DamagedFile: it cannot be read.
    """
    settings, columns = load_columns(self._path)
    wanted = {'layers': self._layers}
    for track in self._tracks:
      wanted |= track.settings()
    # The width has grown with the run; all else must be as before.
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
  """Holds arrays reduced over `records` records, of steps `first` to `last`."""

  first: int
  last: int
  records: int
  arrays: dict[str, np.ndarray]


@dataclasses.dataclass
class _Track:
  """Holds arrays that share their intervals.

  Attributes:
    prefix: of its names in the file.
    reduce: array name -> how steps combine.
    capacity: most intervals kept; even.
    width: records per interval.
    intervals: oldest first; all but the last have `width` records.
  """

  prefix: str
  reduce: dict[str, str]
  capacity: int
  width: int = 1
  intervals: list[_Interval] = dataclasses.field(default_factory=list)

  def add(self, step: int, arrays: dict[str, np.ndarray]) -> None:
    """Adds one record, to the last interval or as a new one."""
    new = _Interval(step, step, 1, arrays)
    if self.intervals and self.intervals[-1].records < self.width:
      self.intervals[-1] = _merge(self.intervals[-1], new, self.reduce)
      return
    # Full: neighbours merge in pairs, and intervals are twice as long.
    if len(self.intervals) == self.capacity:
      halves = zip(self.intervals[::2], self.intervals[1::2])
      self.intervals = [_merge(a, b, self.reduce) for a, b in halves]
      self.width *= 2
    self.intervals.append(new)

  def settings(self) -> dict[str, Any]:
    """Returns what a file of these arrays must agree in, for JSON."""
    named = {'reduce': self.reduce, 'capacity': self.capacity}
    named['width'] = self.width
    return {self.prefix[1:] + name: value for name, value in named.items()}

  def columns(self) -> dict[str, np.ndarray]:
    """Returns the intervals as columns [N ...] of the file."""
    columns = {
      self.prefix + name: np.array(
        [getattr(i, name) for i in self.intervals], np.int64
      )
      for name in ('first', 'last', 'records')
    }
    for name in self.reduce:
      columns[name] = np.stack([i.arrays[name] for i in self.intervals])
    return columns

  def restore(
    self,
    settings: Mapping[str, Any],
    columns: Mapping[str, np.ndarray],
    resume_step: int | None,
  ) -> None:
    """Takes the intervals of a file up to `resume_step`; all if it is None."""
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
  """Reduces two intervals to one."""
  arrays = {
    name: ACCUMULATE[how](a.arrays[name], b.arrays[name])
    for name, how in reduce.items()
  }
  return _Interval(a.first, b.last, a.records + b.records, arrays)


def _widen(array: np.ndarray, how: str) -> np.ndarray:
  """Returns the array in the dtype that is kept.

  Sums stay exact: counts in 64-bit integers, the rest in float64.
  """
  if how == 'sum' and array.dtype.kind in 'biu':
    return array.astype(np.int64)
  if how in ('sum', 'mean'):
    return array.astype(np.float64)
  # A copy, for the caller may reuse the buffer; bfloat16 has no npz type.
  return array.astype(array.dtype if array.dtype.kind in 'biuf' else np.float32)


def _check(reduce: Mapping[str, str], capacity: int) -> None:
  """Raises InputError unless a track's arrays and capacity make sense."""
  for name, how in reduce.items():
    if how not in ACCUMULATE:
      raise InputError(
        f'reduce[{name!r}]={how!r}: choose one of {sorted(ACCUMULATE)}'
      )
    if name.startswith('_'):
      raise InputError(f'reduce[{name!r}]: a name may not start with _')
  if not reduce:
    raise InputError('reduce={} records nothing: name at least one array')
  if capacity < 2 or capacity % 2:
    raise InputError(
      f'capacity={capacity}: intervals merge in pairs, choose an even number'
    )
