"""Defines what all formulas of bytes on wires share.

A ring over n devices sends (n-1)/n of the bytes per reduce-scatter or
all-gather, twice that per all-reduce.
"""

import math
from fractions import Fraction
from typing import NamedTuple

from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan.device_shares import Mesh
from deepseek_jax.plan.memory import Training


class LinkTraffic(NamedTuple):
  """Describes one kind of traffic.

  Attributes:
    purpose: what for.
    link: 'fast' inside a node, 'slow' between nodes.
    bytes: sent by one device in one step.
    formula: how they were counted.
  """

  purpose: str
  link: str
  bytes: int
  formula: str


class StepInputs(NamedTuple):
  """Holds what all formulas read.

  Attributes:
    tokens: those that a device works on in a step (of its sequence shard).
    micro_batches: how many a device works on in a step.
    node: devices that fast links join.
    layers: share of the blocks that pass through a device's stage.
  """

  config: TransformerConfig
  mesh: Mesh
  training: Training
  tokens: int
  micro_batches: int
  node: int
  layers: Fraction


def ring(n: int, size: int) -> int:
  """Returns bytes that each of n devices sends to gather or scatter `size`."""
  return size * (n - 1) // n


def link_of(step: StepInputs, axes: tuple[str, ...]) -> str:
  """Returns 'fast' if the axes and all faster ones fit a node, else 'slow'.

  Devices are numbered with stage slowest, then data, fsdp, expert, context,
  and tensor fastest.
  """
  order = ('tensor', 'context', 'expert', 'fsdp', 'data', 'stage')
  upto = max(order.index(a) for a in axes if getattr(step.mesh, a) > 1)
  span = math.prod(getattr(step.mesh, a) for a in order[: upto + 1])
  return 'fast' if span <= step.node else 'slow'
