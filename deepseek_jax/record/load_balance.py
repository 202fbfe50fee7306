"""Computes how evenly experts are loaded.

MaxVio is from Wang et al. 2024, arXiv:2408.15664, section 4.1.
"""

from typing import Any

import numpy as np


def max_violation(load: Any) -> np.ndarray:
  """Returns MaxVio: how far the busiest expert exceeds an even share.

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
  """Returns the entropy of the load over its largest value log E: 1 is balance.

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
  """Returns part / total; NaN where the total is 0."""
  return np.divide(part, total, out=np.full_like(part, np.nan), where=total > 0)
