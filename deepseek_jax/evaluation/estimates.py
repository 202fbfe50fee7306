"""Estimates pass@k, and how certain a mean over problems is.

Legend: N problems, n answers of a problem, c of them right, R resamples.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from deepseek_jax.errors import InputError

_AT_ONCE = 1 << 22  # numbers drawn at once


def check_k(ks: Sequence[int], n: int) -> None:
  """Raises InputError unless every k lies in 1..n."""
  for k in ks:
    if not 1 <= k <= n:
      raise InputError(
        f'k = {k}: must lie in 1..n = {n}, the answers of a problem; ask for'
        ' more answers or take a smaller k'
      )


def pass_at_k(n: int, right: int, k: int) -> float:
  """Returns the unbiased estimate of pass@k of a problem (arXiv:2107.03374).

  The share of the k-subsets of its n answers that hold a right one, which is
  1 - C(n-c, k) / C(n, k), computed exactly. 1 - (1 - c/n)^k is biased.

  Args:
    n: answers.
    right: c.
    k: how many may be tried.

  Raises:
    InputError: k does not lie in 1..n, or c in 0..n.
  """
  check_k([k], n)
  if not 0 <= right <= n:
    raise InputError(f'right = {right}: must lie in 0..n = {n}')
  wrong = Fraction(math.comb(n - right, k), math.comb(n, k))
  return float(1 - wrong)


def bootstrap(
  values: Sequence[float],
  *,
  resamples: int = 10_000,
  share: float = 0.95,
  seed: int = 0,
) -> tuple[float, float]:
  """Returns an interval of the mean of values [N], one of each problem.

  Problems are drawn again with replacement, R times; the interval is that of
  the means' percentiles. Of one problem it is a point: nothing is known then.

  Args:
    values: of the problems.
    resamples: R.
    share: of the means that lie inside.
    seed: of the draws.
  """
  values = np.asarray(values, np.float64)
  if not values.size or resamples < 1 or not 0 < share < 1:
    raise InputError(
      f'bootstrap: {values.size} values, {resamples} resamples and a share of'
      f' {share}: must be at least 1, at least 1 and between 0 and 1'
    )
  rng, N = np.random.default_rng(seed), values.size
  step = max(_AT_ONCE // N, 1)
  means = [
    values[rng.integers(0, N, (min(step, resamples - start), N))].mean(axis=1)
    for start in range(0, resamples, step)
  ]
  tail = 50 * (1 - share)
  low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
  return float(low), float(high)


def named(resamples: int, share: float = 0.95) -> str:
  """Returns what `bootstrap` computes, in words."""
  return (
    f'{100 * share:g} % by bootstrap over problems, percentiles of'
    f' {resamples} resamples; where all are equal, the exact binomial bounds'
  )


def estimate(
  values: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> dict[str, object]:
  """Returns {'value': mean, 'interval': [low, high]} of problems' values.

  Equal values resample to themselves and would seem certain. Of N of them a
  share p of other problems goes unseen with the probability (1 - p)^N, so the
  mean may lie nearer 0 or 1 by that share: of N wrong or right ones that is
  the exact binomial (Clopper-Pearson) bound.

  Args:
    values: [N] in 0..1, one of each problem.
    resamples, seed: see `bootstrap`.
  """
  if len(set(values)) == 1:
    low, high = _of_equal(float(values[0]), len(values))
  else:
    low, high = bootstrap(values, resamples=resamples, seed=seed)
  return {'value': float(np.mean(values)), 'interval': [low, high]}


def _of_equal(value: float, N: int, share: float = 0.95) -> tuple[float, float]:
  """Returns the interval of the mean where all N values in 0..1 are equal."""
  unseen = 1 - ((1 - share) / 2) ** (1 / N)
  return value * (1 - unseen), value + (1 - value) * unseen
