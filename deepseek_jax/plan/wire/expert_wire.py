"""Counts rows and bytes that an exchange of tokens puts on the wires.

`crossing` counts what a routing really sends; `buffers` what the compiled
program sends, filler included. Legend: N tokens of a device, K choices, E
experts, D model.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.parallel import formats
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.rounds import share


class Crossing(NamedTuple):
  """Counts copies of tokens that leave a device, over all devices.

  Attributes:
    fast: to another device of the same node.
    slow: to another node.
  """

  fast: int
  slow: int


def crossing(
  experts: np.ndarray,
  num_experts: int,
  devices: int,
  *,
  node: int,
  two_hop: bool = False,
) -> Crossing:
  """Returns what one dispatch of a routing sends; a combine sends as much.

  Args:
    experts: [devices N K] int, `num_experts` for nowhere: a device's choices.
    num_experts: E, sharded evenly over the devices.
    devices: size of the expert axis.
    node: neighbouring devices that fast links join.
    two_hop: one copy per node, then on inside it; else one per choice.
  """
  experts = np.asarray(experts).reshape(devices, -1, np.shape(experts)[-1])
  real = experts < num_experts
  to = np.where(real, experts // (num_experts // devices), -1)
  here = np.arange(devices)[:, None, None]
  away = real & (to // node != here // node)
  if not two_hop:
    return Crossing(int((real & ~away & (to != here)).sum()), int(away.sum()))
  # One copy per node visited, however many of its experts are chosen.
  visited = [
    (away & (to // node == a)).any(axis=-1) for a in range(-(-devices // node))
  ]
  # A copy arrives at the device of the sender's place in the other node.
  landed = to // node * node + here % node
  inside = real & (to != landed)
  return Crossing(int(inside.sum()), int(np.sum(visited)))


def row_bytes(cfg: ExchangeConfig, dim: int, dtype: str) -> int:
  """Returns the bytes of a row in a step: dispatch, combine and gradients.

  The gradient of a dispatch is a combine, and the reverse.
  """
  one = lambda form: formats.row_bytes(dim, form, dtype)
  return 2 * (one(cfg.dispatch) + one(cfg.combine))


def buffers(
  cfg: ExchangeConfig, tokens: int, top_k: int, experts: int, devices: int
) -> dict[str, int]:
  """Counts rows that one device sends in the first round of one dispatch.

  Args:
    cfg: its buffers are equal: 'all_gather', 'all_to_all' or 'two_hop'.
    tokens: N, those of a device.
    top_k: K.
    experts: E.
    devices: n of the expert axis.

  Returns:
    {'fast': inside a node, 'slow': between nodes}; all are fast but for
    'two_hop'.
  """
  mine = experts // devices
  if cfg.kind == 'all_gather':
    return {'fast': (devices - 1) * tokens, 'slow': 0}
  if cfg.kind == 'all_to_all':
    # A device gets a row per choice, at most one for each of its experts.
    longest = tokens * min(top_k, mine)
    rows = share(tokens * top_k, devices, longest, cfg.factor)
    return {'fast': (devices - 1) * rows, 'slow': 0}
  if cfg.kind != 'two_hop':
    raise ValueError(f'{cfg.kind}: sends no filler; count with crossing')
  inner = devices // cfg.nodes
  # First hop: a row per node visited. Second: from there a row per choice.
  total = tokens * min(top_k, cfg.nodes)
  rows = share(total, cfg.nodes, tokens, cfg.factor)
  longest = cfg.nodes * rows * min(top_k, mine)
  near = share(tokens * top_k, inner, longest, cfg.factor)
  return {'fast': (inner - 1) * near, 'slow': (cfg.nodes - 1) * rows}
