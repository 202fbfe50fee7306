"""Reads off how much compute reaches a loss, with an interval.

All curves are fitted at once by least squares: ln loss = a + b x + c x^2 +
seed, with x = ln FLOPs, a and b of each arm, one curvature c for all (short
runs bend alike) and one effect of each further seed, since arms with one seed
read the same batches. What is left over, scatter between seeds and misfit
alike, is the variance that intervals are made of, 95 %, Student's t.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import InputError


class Point(NamedTuple):
  """Holds a loss that an arm reached after so many FLOPs, with a seed."""

  arm: str
  flops: float
  loss: float
  seed: int = 0


class CurveFit(NamedTuple):
  """Holds the curves of all arms.

  Attributes:
    arms: their names; `values` begins with a and b of each.
    origin: x is ln FLOPs less it.
    values: [P] of the fit: a, b of every arm, then c, then the seeds.
    covariance: [P P] of the values.
    scatter: standard deviation of ln loss about the curves.
    freedom: degrees of freedom.
    bent: whether there is a c: with two budgets there is none.
    spans: arm -> least and greatest x.
  """

  arms: tuple[str, ...]
  origin: float
  values: np.ndarray
  covariance: np.ndarray
  scatter: float
  freedom: int
  bent: bool
  spans: dict[str, tuple[float, float]]

  def row(self, arm: str, x: float) -> np.ndarray:
    """Returns what the values are multiplied by for an arm's ln loss at x."""
    out = np.zeros(len(self.values))
    place = 2 * self.arms.index(arm)
    out[place : place + 2] = 1.0, x
    if self.bent:
      out[2 * len(self.arms)] = x * x
    return out

  def slope(self, arm: str, x: float) -> float:
    """Returns how ln loss changes with ln FLOPs."""
    bend = self.values[2 * len(self.arms)] if self.bent else 0.0
    return float(self.values[2 * self.arms.index(arm) + 1] + 2 * bend * x)


class Reach(NamedTuple):
  """Holds the compute at which an arm has the loss of the first.

  Attributes:
    ratio: of it to what the first arm spent; 0.5: half of it is enough.
    low, high: of a 95 % interval of the ratio.
    measured: whether the arm was measured on both sides of it; else the curve
      was extended.
  """

  ratio: float
  low: float
  high: float
  measured: bool


def fit(points: Sequence[Point]) -> CurveFit:
  """Returns the curves of points.

  Raises:
    InputError: a number is none, or there are too few for a variance.
  """
  bad = [p for p in points if not (0 < p.flops < np.inf and p.loss > 0)]
  if bad or not all(math.isfinite(p.loss) for p in points):
    raise InputError(
      f'points: {(bad or points)[0]}: FLOPs and losses must be finite and'
      ' above 0; leave out runs that diverged'
    )
  arms = tuple(dict.fromkeys(p.arm for p in points))
  budgets = {arm: {p.flops for p in points if p.arm == arm} for arm in arms}
  few = [arm for arm in arms if len(budgets[arm]) < 2]
  if few or not arms:
    raise InputError(
      f'points: {", ".join(few) or "there are none"}: a curve needs two budgets'
    )
  seeds = sorted({p.seed for p in points})
  bent = max(map(len, budgets.values())) > 2
  logs = np.log([p.flops for p in points])
  origin = float(logs.mean())
  # a, b of every arm, the shared c, a column for each seed but the first.
  design = np.zeros((len(points), 2 * len(arms) + bent + len(seeds) - 1))
  for row, point, x in zip(design, points, logs - origin):
    place = 2 * arms.index(point.arm)
    row[place : place + 2] = 1.0, x
    if bent:
      row[2 * len(arms)] = x * x
    if point.seed != seeds[0]:
      row[2 * len(arms) + bent + seeds.index(point.seed) - 1] = 1.0
  freedom = len(points) - int(np.linalg.matrix_rank(design))
  if freedom < 1 or np.linalg.matrix_rank(design) < design.shape[1]:
    raise InputError(
      f'points: {len(points)} of {design.shape[1]} unknowns leave no variance;'
      ' run more budgets or seeds'
    )
  y = np.log([p.loss for p in points])
  values = np.linalg.lstsq(design, y, rcond=None)[0]
  variance = float(np.sum((y - design @ values) ** 2)) / freedom
  covariance = variance * np.linalg.inv(design.T @ design)
  spans = {
    arm: tuple(np.log([min(budgets[arm]), max(budgets[arm])]) - origin)
    for arm in arms
  }
  return CurveFit(
    arms,
    origin,
    values,
    covariance,
    math.sqrt(variance),
    freedom,
    bent,
    spans,
  )


def _solved(found: CurveFit, arm: str, level: float) -> float | None:
  """Returns the x at which a falling curve has a ln loss; None: it has not."""
  place = 2 * found.arms.index(arm)
  a, b = found.values[place : place + 2]
  c = found.values[2 * len(found.arms)] if found.bent else 0.0
  inside = b * b - 4 * c * (a - level)
  # Of the two places the one where the curve falls, its slope is -root.
  if inside <= 0 or -b + math.sqrt(inside) <= 0:
    return None
  return 2 * (a - level) / (-b + math.sqrt(inside))


def reach(found: CurveFit, arm: str, first: str) -> Reach | None:
  """Returns how much compute gives an arm the final loss of the first.

  That is what the first arm's curve has at its greatest budget. The interval
  has the uncertainty of both curves (the delta method).

  Args:
    found: of `fit`.
    arm: whose compute.
    first: the arm that it is compared with.

  Returns:
    None where the arm's curve never has that loss.

  Raises:
    InputError: there is no such arm.
  """
  for name in (arm, first):
    if name not in found.arms:
      raise InputError(
        f'arm = {name!r}: must be one of {", ".join(found.arms)}'
      )
  if arm == first:
    return Reach(1.0, 1.0, 1.0, True)
  from scipy.special import stdtrit

  end = found.spans[first][1]
  goal = found.row(first, end)
  x = _solved(found, arm, float(goal @ found.values))
  if x is None:
    return None
  # How x moves with each value, from a + b x + c x^2 = the goal.
  moves = -(found.row(arm, x) - goal) / found.slope(arm, x)
  spread = math.sqrt(max(float(moves @ found.covariance @ moves), 0.0))
  half = float(stdtrit(found.freedom, 0.975)) * spread
  low, high = found.spans[arm]
  return Reach(
    math.exp(x - end),
    math.exp(x - end - half),
    math.exp(x - end + half),
    bool(low <= x <= high),
  )
