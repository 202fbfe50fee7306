"""Chooses the ticks of an axis; writes their numbers so that they differ."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_UNITS = (('M', 1e6), ('k', 1e3), ('', 1.0))


class Axis(NamedTuple):
  """Maps numbers to places on an axis: `low` to 0, `high` to 1.

  Attributes:
    low: the number at its beginning, less than `high`.
    high: the number at its end.
    log: equal factors are equally far apart; `low` is positive.
  """

  low: float
  high: float
  log: bool = False

  def place(self, values: np.ndarray | float) -> np.ndarray:
    """Returns where numbers lie, as float64 shares of the axis."""
    scale = np.log if self.log else np.asarray
    low, high = scale(self.low), scale(self.high)
    # Halves: the span of the largest numbers is not finite.
    half = lambda a: np.asarray(a, np.float64) / 2
    return (half(scale(values)) - half(low)) / (half(high) - half(low))


class Tick(NamedTuple):
  """Holds a number beside an axis.

  Attributes:
    place: percent of the axis.
    label: the number.
    odd: it is left out where there is little room.
  """

  place: float
  label: str
  odd: bool


def step_axis(steps: np.ndarray, log: bool = False) -> Axis:
  """Returns the axis from first to last step; one step is its middle."""
  low, high = float(np.min(steps)), float(np.max(steps))
  if low == high:
    return Axis(low - 0.5, high + 0.5)
  return Axis(low, high, log)


def value_axis(values: np.ndarray) -> Axis:
  """Returns the axis of finite values, logarithmic if they span too much.

  That is a range that a linear axis would flatten, such as a gradient norm's.
  """
  values = values[np.isfinite(values)]
  if not values.size:
    return Axis(0.0, 1.0)
  low, high = float(values.min()), float(values.max())
  if low > 0 and high / 30 > np.median(values):
    pad = (high / low) ** 0.04
    return Axis(low / pad, high * pad, log=True)
  span = high / 2 - low / 2  # of two large numbers may be infinite
  # Values that rounding alone tells apart are one value.
  if span <= max(1e-290, 1e-12 * max(abs(low), abs(high))):
    pad = max(abs(low), 1.0) * 0.05
  else:
    pad = 0.08 * span
  limit = np.finfo(np.float64).max
  return Axis(max(low - pad, -limit), min(high + pad, limit))


def ticks(axis: Axis, most: int = 5, whole: bool = False) -> list[Tick]:
  """Returns at most `most` ticks of an axis, at round numbers.

  Args:
    axis: of finite numbers.
    most: how many there is room for, two or more.
    whole: no fractions, as of steps.
  """
  if axis.log:
    numbers = _of_log(axis, most)
  else:
    numbers = _round(axis.low, axis.high, most, whole)
  places = 100 * axis.place(np.array(numbers, np.float64))
  return [
    Tick(round(float(place), 3), label, n % 2 == 1)
    for n, (place, label) in enumerate(zip(places, labels(numbers)))
  ]


def _round(low: float, high: float, most: int, whole: bool) -> list[float]:
  """Returns the multiples of a round number from low to high."""
  raw = high / most - low / most
  power = 10.0 ** math.floor(math.log10(raw))
  factors = (1, 2, 5, 10, 20) if whole else (1, 2, 2.5, 5, 10, 20)
  for factor in factors:
    step = max(1.0, factor * power) if whole else factor * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    if last - first < most:
      break
  return [n * step for n in range(first, last + 1)]


def _of_log(axis: Axis, most: int) -> list[float]:
  """Returns powers of ten, and 5 and 2 times them where there is room."""
  span = range(
    math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1
  )
  room, kept = 0.9 / (most - 1), {}
  for number in (f * 10.0**k for f in (1, 5, 2) for k in span):
    place = float(axis.place(number))
    if 0 <= place <= 1 and all(abs(place - p) >= room for p in kept):
      kept[place] = number
  if len(kept) < 2:
    return _round(axis.low, axis.high, most, whole=False)
  return sorted(kept.values())


def labels(numbers: Sequence[float]) -> list[str]:
  """Returns numbers as short texts that tell them apart, alike in form."""
  top = max(map(abs, numbers), default=0.0)
  gaps = np.diff(sorted(numbers))
  near = 1e-3 * float(gaps.min() if len(gaps) else top)
  if top >= 1e9 or 0 < top < 1e-3:
    forms = [(lambda v, d=d: _exponent(v, d), 1.0) for d in range(16)]
  else:
    unit, size = next(((u, s) for u, s in _UNITS if top >= s), _UNITS[-1])
    forms = [(lambda v, d=d: f'{v:.{d}f}', size) for d in range(16)]
  for write, size in forms:
    texts = [write(number / size) for number in numbers]
    back = [float(text) * size for text in texts]
    if all(abs(a - b) <= near for a, b in zip(back, numbers)):
      break
  if size > 1:
    texts = [text + unit for text in texts]
  return ['0' if not number else text for number, text in zip(numbers, texts)]


def _exponent(number: float, digits: int) -> str:
  """Returns a number with an exponent of no needless digits: 5e-4."""
  digits_, power = f'{number:.{digits}e}'.split('e')
  return f'{digits_}e{int(power)}'
