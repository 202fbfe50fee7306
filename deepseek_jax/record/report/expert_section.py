"""Builds the report's section on the experts, from a recorded run.

Legend: N intervals, L MoE layers, E experts, G groups of neighbouring experts.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.record import flight, load_balance
from deepseek_jax.record.report import curves as curve_charts
from deepseek_jax.record.report import expert_figures as figures

# Values sent to the page's own script, per array: 16 bits each.
_INSPECTED = 300_000
_TITLES = {
  'entropy': 'Entropy of the gate / log E',
  'moved': 'Share of tokens moved by the bias',
  'dropped': 'Choices dropped',
}


def routing_section(path: Path) -> dict[str, Any] | None:
  """Returns figures of the experts' load, bias and balance; None if dense.

  Args:
    path: the run's routing.npz; without it the model is dense.

  Returns:
    What the page's template reads: 'load', 'layers', 'lines', 'balance' and
    'together' hold charts and maps, 'inspector' is what the page's script
    draws.
  """
  if not path.exists():
    return None
  run = flight.load(path)
  layers = run.layers.tolist()
  edges = _edges(run)
  experts = {k: a for k, a in run.arrays.items() if a.ndim == 3}
  by_layer = {
    _TITLES.get(k) or curve_charts.title(k): a.reshape(len(a), -1)
    for k, a in run.arrays.items()
    if a.ndim <= 2
  }
  result: dict[str, Any] = {'load': None, 'layers': [], 'lines': []}
  if 'load' in experts:
    load = experts['load']
    share = _share(load)
    result['load'] = figures.load_by_layer(share[-1], layers)
    result['layers'] = figures.load_over_time(share, edges, layers)
    result['facts'] = _load_facts(run, load)
    result['table'] = _table(share[-1], layers)
    by_layer = {
      'MaxVio': load_balance.max_violation(load),
      'Entropy of the load / log E': load_balance.load_entropy(load),
    } | by_layer
    experts = {'load': share} | {
      k: a for k, a in experts.items() if k != 'load'
    }
  result['lines'] = [
    (name, figures.lines_over_time(values, run.last, layers, name))
    for name, values in experts.items()
    if name != 'load'
  ]
  result['balance'] = figures.layer_curves(by_layer, run.last, layers)
  result['keys'] = figures.layer_keys(layers) if len(layers) > 1 else []
  result['layer_count'] = len(layers)
  result['inspector'] = _inspector(experts, run, edges)
  result['together'] = None
  if run.coarse and 'together' in run.coarse.arrays:
    lift = _lift(run.coarse.arrays['together'][-1])
    shapes = [values.shape for values in experts.values()]
    count = shapes[0][-1] if shapes else lift.shape[-1]
    result['together'] = {
      'maps': figures.chosen_together(lift, layers, count),
      'first': int(run.coarse.first[-1]),
      'last': int(run.coarse.last[-1]),
    }
    if result['inspector']:
      result['inspector']['together'] = {
        'groups': lift.shape[-1],
        **_quantised(lift),
      }
  return result


def _lift(together: np.ndarray) -> np.ndarray:
  """Returns pairs [L G G] over what independent choices would give, float64.

  NaN stands for a group with itself, and where nothing was chosen.
  """
  together = together.astype(np.float64)
  chosen = together.sum(axis=-1)
  chance = chosen[:, :, None] * chosen[:, None, :]
  chance /= np.maximum(chosen.sum(axis=-1), 1)[:, None, None]
  none = np.full(together.shape, np.nan)
  lift = np.divide(together, chance, out=none, where=chance > 0)
  lift[:, np.eye(lift.shape[-1], dtype=bool)] = np.nan
  return lift


def _share(load: np.ndarray) -> np.ndarray:
  """Returns the load over an even share of its layer's tokens; 1 is balance."""
  mean = load.mean(-1, keepdims=True)
  return np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)


def _edges(run: flight.Flight) -> np.ndarray:
  """Returns the steps at which intervals begin and end, [N + 1]."""
  # The first interval begins before its first record, by a record's steps.
  gaps = np.diff(run.last) / run.records[1:]  # steps per record
  inside = (run.last[0] - run.first[0]) / max(1, run.records[0] - 1)
  gap = gaps[0] if len(gaps) else max(1, inside)
  start = max(0.0, run.first[0] - gap)
  return np.concatenate([[start], run.last])


def _load_facts(run: flight.Flight, load: np.ndarray) -> dict[str, Any]:
  """Returns the last interval's steps, worst MaxVio and idle experts."""
  violation = load_balance.max_violation(load[-1])
  worst = int(np.nanargmax(violation)) if np.isfinite(violation).any() else 0
  return {
    'first': int(run.first[-1]),
    'last': int(run.last[-1]),
    'worst': f'{violation[worst]:.3g}',
    'layer': int(run.layers[worst]),
    'idle': int((load[-1] == 0).sum()),
    'experts': load[-1].size,
  }


def _table(share: np.ndarray, layers: list[int]) -> list[tuple]:
  """Returns rows of layer, MaxVio, busiest and idlest expert, idle experts."""
  named = lambda row, n: f'{row[n]:.3g} (expert {n})'
  return [
    (
      layer,
      f'{row.max() - 1:.3g}',
      named(row, int(row.argmax())),
      named(row, int(row.argmin())),
      int((row == 0).sum()),
    )
    for layer, row in zip(layers, share)
  ]


def _inspector(
  experts: Mapping[str, np.ndarray], run: flight.Flight, edges: np.ndarray
) -> dict[str, Any] | None:
  """Returns what the page's script draws: arrays [cells L E] in 16 bits."""
  if not experts:
    return None
  _, L, E = shape = next(iter(experts.values())).shape
  cells = int(np.clip(_INSPECTED // (L * E), 16, 160))
  pick = np.arange(len(run.last))
  if len(pick) > cells:
    pick = np.unique(np.append(figures.sample(edges, cells), pick[-1]))
  arrays = [
    {'name': name, **_quantised(values[pick])}
    for name, values in experts.items()
    if values.shape == shape
  ]
  return {
    'layers': run.layers.tolist(),
    'experts': E,
    'first': run.first[pick].tolist(),
    'last': run.last[pick].tolist(),
    'start': float(edges[0]),
    'arrays': arrays,
  }


def _quantised(values: np.ndarray) -> dict[str, Any]:
  """Encodes numbers as low + scale x 16-bit little-endian integers, in base64.

  The last code, 65535, stands for what is not finite.
  """
  values = values.astype(np.float64)
  finite = np.isfinite(values)
  kept = values[finite] if finite.any() else np.zeros(1)
  low, high = float(kept.min()), float(kept.max())
  scale = (high - low) / 65534 or 1.0
  codes = np.round((np.where(finite, values, low) - low) / scale)
  codes = np.where(finite, codes, 65535).astype('<u2')
  data = base64.b64encode(codes.tobytes()).decode()
  return {'low': low, 'scale': scale, 'data': data}
