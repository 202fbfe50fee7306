"""Makes models comparable: solves a width or the depth for an equal cost.

An ablation that also changes how much is computed or stored says little. Here
the hidden widths of FFN and experts, or the repeats of the last layers, change
until a model has as many active parameters, parameters or training FLOPs per
token as another.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from deepseek_jax.config_changes import changed
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import TransformerConfig
from deepseek_jax.plan.flops import count_flops
from deepseek_jax.plan.parameters import count_parameters

KNOBS = ('width', 'depth')
_WIDTHS = ('ffn.width', 'moe.width')
_STEP = 8  # widths are multiples of it
_MOST = 32.0  # times as wide, or as deep
CLOSE = 0.02  # of the goal
_EQUAL = 1e-3  # of the goal: no change is worth it


class Matched(NamedTuple):
  """Holds a model that costs what another does.

  Attributes:
    config: of the model.
    changes: dotted field -> value.
    cost, goal: of the quantity that is matched.
  """

  config: TransformerConfig
  changes: dict[str, object]
  cost: float
  goal: float

  @property
  def off(self) -> float:
    """Returns how far the cost is from the goal, as a share of it."""
    return self.cost / self.goal - 1


def quantity(name: str, seq_len: int) -> Callable[[TransformerConfig], float]:
  """Returns what measures a model: 'active_params', 'params' or 'flops'.

  FLOPs are those of training, per token of a sequence of `seq_len`.

  Raises:
    InputError: another name.
  """
  known = {
    'active_params': lambda c: count_parameters(c).active,
    'params': lambda c: count_parameters(c).total,
    'flops': lambda c: count_flops(c, seq_len, mtp=True).per_token,
  }
  if name not in known:
    raise InputError(f'match = {name!r}: must be one of {", ".join(known)}')
  return known[name]


def _wider(config: TransformerConfig, times: float) -> dict[str, int]:
  """Returns the widths of FFN and experts, times a factor, in whole steps."""
  out = {}
  for path in _WIDTHS:
    part = getattr(config, path.partition('.')[0])
    if part is not None:
      out[path] = max(round(part.width * times / _STEP), 1) * _STEP
  return out


def _dense_wider(config: TransformerConfig, times: float) -> dict[str, int]:
  """Returns the width of the dense FFN alone, times a factor."""
  return {'ffn.width': _wider(config, times)['ffn.width']}


def _deeper(config: TransformerConfig, times: float) -> dict[str, tuple]:
  """Returns the layout with the repeats of its last entry times a factor."""
  *first, (names, repeat) = config.layout
  return {'layout': (*first, (names, max(round(repeat * times), 1)))}


def match(
  config: TransformerConfig,
  like: TransformerConfig,
  name: str,
  *,
  seq_len: int,
  knob: str = 'width',
) -> Matched:
  """Returns `config` with the widths or the depth at which it costs as `like`.

  Raises:
    InputError: no width or depth comes within CLOSE of it.
  """
  if knob not in KNOBS:
    raise InputError(f'match_by = {knob!r}: must be one of {", ".join(KNOBS)}')
  cost = quantity(name, seq_len)
  goal, turn = cost(like), {'width': _wider, 'depth': _deeper}[knob]
  made = config
  if abs(cost(config) / goal - 1) > _EQUAL:
    made = _at(config, turn, cost, goal)
  both = made.ffn is not None and made.moe is not None
  if knob == 'width' and both and abs(cost(made) / goal - 1) > _EQUAL:
    # A step of all experts is large: the dense FFN makes up the rest.
    finer = _at(made, _dense_wider, cost, goal)
    made = min((made, finer), key=lambda c: abs(cost(c) - goal))
  changes = {
    path: _field(made, path)
    for path in turn(made, 1.0)
    if _field(made, path) != _field(config, path)
  }
  out = Matched(made, changes, cost(made), goal)
  if abs(out.off) > CLOSE:
    other = 'depth' if knob == 'width' else 'width'
    raise InputError(
      f'match = {name!r}: by {knob} the closest is {out.cost:,.4g} of'
      f' {goal:,.4g} ({100 * out.off:+.1f} %); try --match_by={other}, or'
      ' change the arm'
    )
  return out


def _at(
  config: TransformerConfig,
  turn: Callable[[TransformerConfig, float], dict],
  cost: Callable[[TransformerConfig], float],
  goal: float,
) -> TransformerConfig:
  """Returns a model turned to where its cost is nearest to a goal."""
  at = lambda times: changed(config, turn(config, times))
  whole = lambda times: repr(turn(config, times))
  return at(_solved(lambda times: cost(at(times)), whole, goal))


def _field(config: TransformerConfig, path: str) -> object:
  """Returns the value at a dotted path."""
  value = config
  for name in path.split('.'):
    value = getattr(value, name)
  return value


def _solved(
  cost: Callable[[float], float], whole: Callable[[float], str], goal: float
) -> float:
  """Returns the factor whose cost, growing with it, is nearest to a goal."""
  low, high = 1 / _MOST, _MOST
  # Widths and layers are whole: near factors make the same model.
  while high / low > 1.001 and whole(low) != whole(high):
    middle = (low * high) ** 0.5
    low, high = (middle, high) if cost(middle) < goal else (low, middle)
  return min((low, high), key=lambda times: abs(cost(times) - goal))


def told(matched: Matched, name: str) -> str:
  """Returns a line on what was changed, and how near it comes."""
  changes = ', '.join(f'{k} = {v}' for k, v in matched.changes.items())
  return (
    f'{changes or "nothing changed"}: {name} {matched.cost:,.4g} against'
    f' {matched.goal:,.4g} ({100 * matched.off:+.2f} %)'
  )


def matched_run(config: object, like: object, name: str, knob: str) -> tuple:
  """Returns a run whose model costs what that of another run does, and a line.

  Args:
    config, like: RunConfigs, or other dataclasses with `model` and `data`.
    name: see `quantity`.
    knob: 'width' or 'depth'.
  """
  found = match(
    config.model, like.model, name, seq_len=config.data.seq_len, knob=knob
  )
  return dataclasses.replace(config, model=found.config), told(found, name)
