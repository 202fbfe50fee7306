"""The expert-contiguous layout in XLA: gathers in both directions."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import reference as quantize

_FEW = 64  # choices that are compared with one another instead of sorted


class Plan(NamedTuple):
  """Locates each (token, choice) among the rows; see `plan`. N K E M as there.

  slot and source are inverse to each other: what spreads tokens may go by
  either, and a row in neither would hold anything.
  """

  slot: jax.Array  # [N K] row of the choice; M for one that goes nowhere
  source: jax.Array  # [M] flat choice n*K + k of each row; N*K for filler
  block_expert: jax.Array  # [M // block] expert of each block of rows
  counts: jax.Array  # [E] rows that each expert got

  @property
  def used(self) -> jax.Array:
    """Returns how many leading blocks hold rows, int32 []; the rest: filler."""
    block = self.source.shape[0] // self.block_expert.shape[0]
    return ((self.counts + block - 1) // block).sum()


def num_blocks(choices: int, num_experts: int, block: int) -> int:
  """Returns the least number of blocks that holds every possible choice."""
  # An expert wastes at most block - 1 rows, and only if it got a choice.
  active = min(choices, num_experts)
  return max((choices + active * (block - 1)) // block, 1)


def pick_block(choices: int, num_experts: int, wide: bool) -> int:
  """Returns rows per block: an eighth of an expert's share, to waste little.

  A CPU joins adjoining blocks, so small ones cost it nothing. Others read an
  expert's weights once per block, and multiply tiles of 64 or 128 rows.
  """
  share = choices // num_experts
  if wide:
    return 64 if share < 256 else 128
  return min(1 << max(share // 8, 1).bit_length() - 1, 32)


def plan(experts: jax.Array, num_experts: int, block: int) -> Plan:
  """Returns the layout of experts [N K] by one stable sort."""
  N, K = experts.shape
  E, C = num_experts, N * K
  M = num_blocks(C, E, block) * block
  if not C:
    rows, blocks, none = (jnp.zeros(n, jnp.int32) for n in (M, M // block, E))
    return Plan(experts.astype(jnp.int32), rows, blocks, none)
  flat = experts.reshape(C).astype(jnp.int32)
  flat = jnp.where((flat < 0) | (flat >= E), E, flat)
  if block == 1 and C <= _FEW:
    return _plan_few(flat, N, E)
  # One operand to sort, and the order among equals is the index: stable.
  keys = jnp.sort(flat * C + jnp.arange(C, dtype=jnp.int32))
  order = keys % C
  bounds = jnp.arange(E + 1, dtype=jnp.int32) * C
  first = _search(keys, bounds, 'left')
  counts = first[1:] - first[:-1]
  ends = jnp.cumsum((counts + block - 1) // block)  # in blocks
  starts = ends - (counts + block - 1) // block
  blocks = jnp.arange(M // block, dtype=jnp.int32)
  expert = _search(ends, blocks, 'right')
  expert = jnp.minimum(expert, E - 1)
  row = (blocks - starts[expert])[:, None] * block + jnp.arange(block)
  real = row < counts[expert][:, None]
  place = jnp.where(real, first[expert][:, None] + row, C).reshape(M)
  source = order.at[place].get(mode='fill', fill_value=C)
  rows = jnp.arange(M, dtype=jnp.int32)
  slot = jnp.full(C, M, jnp.int32).at[source].set(rows, mode='drop')
  return Plan(slot.reshape(N, K), source, expert, counts)


def _plan_few(flat: jax.Array, N: int, E: int) -> Plan:
  """Returns `plan` of few choices [C], E for nowhere, in blocks of one row.

  Every choice is compared with every other: decoding then waits for no sort
  and no search, each a loop on a CPU.
  """
  C = flat.shape[0]
  every = jnp.arange(C, dtype=jnp.int32)
  count = functools.partial(jnp.sum, dtype=jnp.int32)
  keys = flat * C + every
  # Its row is how many choices come before: [C].
  slot = count(keys < keys[:, None], axis=1)
  here = slot == every[:, None]  # [M C], whether a row is a choice's
  expert = count(jnp.where(here, flat, 0), axis=1)
  source = count(jnp.where(here, every, 0), axis=1)
  counts = count(flat == jnp.arange(E, dtype=jnp.int32)[:, None], axis=1)
  return Plan(
    jnp.where(flat < E, slot, C).reshape(N, -1),
    jnp.where(expert < E, source, C),
    jnp.minimum(expert, E - 1),
    counts,
  )


def _search(ordered: jax.Array, values: jax.Array, side: str) -> jax.Array:
  """Returns where values would stand among ordered ones, int32.

  Its steps are few. A loop of them would cost decoding on a GPU more, unrolled
  they cost a CPU's compiler more.
  """
  by = lambda method: functools.partial(
    jnp.searchsorted, side=side, method=method
  )
  found = jax.lax.platform_dependent(
    ordered, values, cpu=by('scan'), default=by('scan_unrolled')
  )
  return found.astype(jnp.int32)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  """Returns rows of x; an index past the end gives zeros."""
  if not x.shape[0]:
    return jnp.zeros((*index.shape, *x.shape[1:]), x.dtype)
  return jnp.take(x, index, axis=0, mode='fill', fill_value=0)


def permute(x: jax.Array, plan: Plan) -> jax.Array:
  """Returns the rows [M D] of tokens x [N D]."""
  return _take(x, plan.source // plan.slot.shape[1])


def permute_fp8(
  x: jax.Array, plan: Plan, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Returns the rows [M D] float8 and their scales [M D/128]."""
  q, scales = quantize.quantize(x, (1, 128), power_of_two, floor)
  token = plan.source // plan.slot.shape[1]
  return _take(q, token), _take(scales, token)


def permute_bwd(grad: jax.Array, plan: Plan) -> jax.Array:
  """Returns the tokens' gradient [N D] of the rows' gradient [M D]."""
  picked = [_take(grad, s) for s in plan.slot.T]  # K times [N D]
  return sum(p.astype(jnp.float32) for p in picked).astype(grad.dtype)


def combine(rows: jax.Array, weights: jax.Array, plan: Plan) -> jax.Array:
  """Returns the weighted sums [N D] of rows [M D]."""
  w = weights.astype(jnp.float32).T[..., None]  # [K N 1]
  picked = (_take(rows, s).astype(jnp.float32) for s in plan.slot.T)
  return sum(w[k] * p for k, p in enumerate(picked)).astype(rows.dtype)


def combine_bwd(
  rows: jax.Array, weights: jax.Array, plan: Plan, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of rows [M D] and weights [N K]."""
  K = plan.slot.shape[1]
  g = grad.astype(jnp.float32)
  scale = _take(weights.astype(jnp.float32).reshape(-1), plan.source)
  drows = scale[:, None] * _take(g, plan.source // K)
  dots = [(g * _take(rows, s)).sum(-1) for s in plan.slot.T]
  dweights = jnp.stack(dots, axis=1).astype(weights.dtype)
  return drows.astype(rows.dtype), dweights
