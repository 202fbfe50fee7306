"""Writes how often an answer's tokens went to each expert."""

from typing import Any

import numpy as np


def load(counts: Any) -> dict[str, Any] | None:
  """Returns counts [L E] as JSON values; None if the model has no experts."""
  if counts is None:
    return None
  rows = np.asarray(counts)
  return {
    'layers': rows.shape[0],
    'experts': rows.shape[1],
    'counts': rows.round().astype(int).tolist(),
  }
