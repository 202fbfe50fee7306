"""Balances expert-parallel load: copies of busy experts, over devices.

DeepSeek-V3 (arXiv:2412.19437, section 3.4) serves with redundant experts; the
placement is the greedy one of DeepSeek's EPLB: whole expert groups to nodes,
copies inside a node, copies to its devices.
Legend: L layers, E experts, R copies of experts in all, X copies of one.
"""

from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import InputError


class Placing(NamedTuple):
  """Describes which copy is of which expert.

  Copy r lies on device r // (R / devices).
  """

  expert: np.ndarray  # [L R] of each copy
  copies: np.ndarray  # [L E X] of each expert, padded with -1
  counts: np.ndarray  # [L E]


def pack(weight: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
  """Assigns equally many items to each pack, heaviest items first.

  Items go in order of falling weight, each to the lightest pack with room.

  Args:
    weight: [n] of the items.
    packs: divides n.

  Returns:
    (pack, place in the pack) of each item [n].
  """
  n = len(weight)
  if n == packs:
    return np.arange(n), np.zeros(n, int)
  pack, place = np.zeros(n, int), np.zeros(n, int)
  total, filled = np.zeros(packs), np.zeros(packs, int)
  for item in np.argsort(-weight, kind='stable'):
    room = np.where(filled < n // packs, total, np.inf)
    best = int(room.argmin())  # the first of equals
    pack[item], place[item] = best, filled[best]
    total[best] += weight[item]
    filled[best] += 1
  return pack, place


def replicate(weight: np.ndarray, copies: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns one copy of each item, and more of those busiest per copy.

  Args:
    weight: [n], load of the items.
    copies: in all; at least n.

  Returns:
    (item of each copy [copies], copies of each item [n]).
  """
  n = len(weight)
  item, counts = list(range(n)), np.ones(n, int)
  for _ in range(copies - n):
    busiest = int((weight / counts).argmax())
    item.append(busiest)
    counts[busiest] += 1
  return np.array(item), counts


def _inverse(order: np.ndarray) -> np.ndarray:
  """Returns the inverse of a permutation [n]."""
  out = np.empty_like(order)
  out[order] = np.arange(len(order))
  return out


def _place_layer(
  weight: np.ndarray, copies: int, groups: int, nodes: int, devices: int
) -> np.ndarray:
  """Returns the expert of each copy [R], of one layer.

  Args:
    weight: [E], load of each expert.
    copies: R.
    groups: divides E.
    nodes: divides groups and devices.
    devices: divides R.
  """
  E = len(weight)
  size, per_node = E // groups, groups // nodes
  # Whole groups go to nodes, as a token's groups are limited.
  node, place = pack(weight.reshape(groups, size).sum(axis=1), nodes)
  first = (node * per_node + place) * size  # of each group, node by node
  sorted_place = (first[:, None] + np.arange(size)).reshape(-1)
  original = _inverse(sorted_place)
  out = []
  for part in original.reshape(nodes, -1):
    # Inside a node its experts are copied, the busiest per copy first.
    item, counts = replicate(weight[part], copies // nodes)
    load = (weight[part] / counts)[item]
    # A copy has its share of the expert's load; devices get equally many.
    device, at = pack(load, devices // nodes)
    order = _inverse(device * (copies // devices) + at)
    out.append(part[item[order]])
  return np.concatenate(out)


def rebalance_experts(
  weight: np.ndarray,
  num_replicas: int,
  num_groups: int,
  num_nodes: int,
  num_gpus: int,
) -> Placing:
  """Returns where the copies of every layer's experts go.

  Args:
    weight: [L E], load of each expert.
    num_replicas: R; at least E, a multiple of num_gpus.
    num_groups: groups of neighbouring experts that the router limits tokens
      to; kept on one node each if num_nodes divides it.
    num_nodes: divides num_gpus.
    num_gpus: devices.

  Raises:
    InputError: sizes that do not divide.
  """
  weight = np.asarray(weight, np.float64)
  E = weight.shape[1]
  _check(E, num_replicas, num_groups, num_nodes, num_gpus)
  # Groups can't stay on one node each: place experts over all devices.
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  place = lambda w: _place_layer(
    w, num_replicas, num_groups, num_nodes, num_gpus
  )
  expert = np.stack([place(w) for w in weight])
  return Placing(expert, *_lists(expert, E))


def _lists(expert: np.ndarray, E: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the copies of each expert [L E X], and how many there are [L E]."""
  counts = np.stack([np.bincount(row, minlength=E) for row in expert])
  copies = np.full((*counts.shape, counts.max()), -1)
  for layer, row in enumerate(expert):
    for e in range(E):
      (found,) = np.nonzero(row == e)
      copies[layer, e, : len(found)] = found
  return copies, counts


def _check(
  E: int, replicas: int, groups: int, nodes: int, devices: int
) -> None:
  """Raises InputError for sizes that do not divide."""
  if replicas < E or replicas % devices:
    raise InputError(
      f'num_replicas = {replicas}: must be at least the {E} experts, and a'
      f' multiple of num_gpus = {devices}'
    )
  if E % groups or devices % nodes:
    raise InputError(
      f'num_groups = {groups}, num_nodes = {nodes}: must divide the {E}'
      f' experts and num_gpus = {devices}'
    )
