"""Describes a number that a training step returns, where it is computed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from deepseek_jax import files

FILE = 'metrics.json'


class Metric(NamedTuple):
  """What a logged number is.

  Every metric adds up over micro-batches and devices: a step returns shares
  of a sum. Scalars add up over pipeline stages too; what has an axis of layers
  is put together there.

  Attributes:
    title: of its curve.
    unit: of its values.
    per: what its leading axes are: nothing (a scalar, which is written to
      metrics.jsonl), MoE layers (written to routing.npz), or named blocks
      (kept for `replay` and abort.jsonl).
    over: how values of several steps become one: their sum, their mean or the
      last one.
  """

  title: str
  unit: str = ''
  per: Literal['', 'layer', 'block'] = ''
  over: Literal['sum', 'mean', 'last'] = 'mean'


def describe(workdir: Path, metrics: Mapping[str, Metric]) -> None:
  """Writes the titles and units of a run's metrics beside its numbers."""
  rows = {name: m._asdict() for name, m in metrics.items()}
  with files.whole(workdir / FILE) as scratch:
    scratch.write_text(json.dumps(rows, indent=1) + '\n')


def described(workdir: Path) -> dict[str, Metric]:
  """Returns what `describe` wrote; nothing of a run from before, or damaged."""
  try:
    rows = json.loads((workdir / FILE).read_text())
    return {name: Metric(**row) for name, row in rows.items()}
  except (OSError, ValueError, TypeError, AttributeError):
    return {}
