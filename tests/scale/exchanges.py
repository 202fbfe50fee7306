"""Routed experts on 8 fake devices by every exchange, and on one device.

    python -m tests.scale.exchanges NAME ...

prints, per case and routing: the greatest differences, what did not fit a
first buffer, and what by hand should not.
"""

import dataclasses
import json
import math
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.experts.moe import apply_experts
from deepseek_jax.parallel import exchange, mesh, sharding
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan.compiled_collectives import collectives
from deepseek_jax.plan.wire import expert_wire as traffic
from tests import tiny

B, T, E, K, F = 8, 6, 8, 3, 8
A2A = ExchangeConfig(factor=1.0)
TWO = ExchangeConfig('two_hop', nodes=2, factor=1.0)
CASES = {
  'local': MeshConfig(data=4, context=2),
  'all_gather': MeshConfig(
    fsdp=2, expert=4, exchange=ExchangeConfig('all_gather')
  ),
  'all_to_all': MeshConfig(expert=4, tensor=2, exchange=A2A),
  'small_buffers': MeshConfig(
    expert=4, context=2, exchange=dataclasses.replace(A2A, factor=0.5)
  ),
  'dropping': MeshConfig(
    expert=4, exchange=dataclasses.replace(A2A, factor=0.5, dropless=False)
  ),
  'two_hop': MeshConfig(data=2, expert=4, exchange=TWO),
  'four_nodes': MeshConfig(
    expert=8, exchange=ExchangeConfig('two_hop', nodes=4, factor=0.5)
  ),
  'ragged': MeshConfig(
    data=2,
    expert=4,
    exchange=ExchangeConfig('ragged_all_to_all', factor=0.5),
  ),
  'odd_batch': MeshConfig(expert=4, exchange=A2A),
  'bfloat16': MeshConfig(
    expert=4,
    exchange=dataclasses.replace(
      A2A, dispatch='bfloat16', combine='bfloat16', factor=9.0
    ),
  ),
  'float8': MeshConfig(
    expert=4,
    exchange=dataclasses.replace(
      TWO, dispatch='float8', combine='bfloat16', factor=9.0
    ),
  ),
}


def ragged_by_gathering(
  operand, output, starts, sizes, starts_there, got, *, axis_name
):
  """`jax.lax.ragged_all_to_all` as documented, for a CPU has none.

  What a receiver does not expect is NaN, or the lowest number.
  """
  gather = lambda a: jax.lax.all_gather(a, axis_name)
  me = jax.lax.axis_index(axis_name)
  every, start, size, there = map(
    gather, (operand, starts, sizes, starts_there)
  )
  row = jnp.arange(operand.shape[0])
  for sender in range(every.shape[0]):
    at = row - start[sender, me]
    sent = (at >= 0) & (at < size[sender, me])
    place = jnp.where(sent, there[sender, me] + at, output.shape[0])
    output = output.at[place].set(every[sender], mode='drop')
  bad = (
    jnp.nan
    if jnp.issubdtype(output.dtype, jnp.floating)
    else jnp.iinfo(output.dtype).min
  )
  return jnp.where((got == size[:, me]).all(), output, bad)


def routing(seed: int, skew: float, rows: int):
  """[B T K] experts, the first two `skew` times as likely; some nowhere."""
  rng = np.random.default_rng(seed)
  chance = np.where(np.arange(E) < 2, skew, 1.0)
  noisy = np.log(chance) + rng.gumbel(size=(rows, T, E))
  experts = np.argsort(-noisy, axis=-1)[..., :K].astype(np.int32)
  experts[0, 1] = E  # padding
  experts[min(3, rows - 1), 2, 1] = E  # a choice over capacity
  return experts


def expected_misses(experts, cfg: MeshConfig) -> int:
  """Choices beyond a first buffer, by a loop over tokens; one kind only."""
  n, factor = cfg.expert, cfg.exchange.factor
  cut = cfg.data * cfg.fsdp
  blocks = experts.reshape(cut * n, -1, cfg.context, T // cfg.context, K)
  blocks = blocks.transpose(0, 2, 1, 3, 4).reshape(cut * n * cfg.context, -1)
  most = math.ceil(factor * blocks.shape[1] / n)
  most = min(most, blocks.shape[1] // K * min(K, E // n))
  missed = 0
  for choices in blocks:
    seen = dict.fromkeys(range(n), 0)
    for expert in choices:
      if expert < E:
        seen[expert // (E // n)] += 1
    missed += sum(max(count - most, 0) for count in seen.values())
  return missed


def sent(compiled, dim: int, devices: int) -> int:
  """Bytes of tokens that one device sends in first rounds, forward and back."""
  found = collectives(compiled.as_text(), devices)
  return sum(
    c.sent
    for c in found
    if c.kind in ('all-to-all', 'all-gather')
    and not c.maybe
    and all(a.shape[-1] == dim for a in c.arrays)
  )


def planned(cfg: MeshConfig, dim: int) -> int | None:
  """The same by `traffic.buffers`."""
  if cfg.expert == 1 or cfg.exchange.kind == 'ragged_all_to_all':
    return None
  tokens = B * T // (cfg.data * cfg.fsdp * cfg.expert * cfg.context)
  rows = traffic.buffers(cfg.exchange, tokens, K, E, cfg.expert)
  return sum(rows.values()) * traffic.row_bytes(cfg.exchange, dim, jnp.float32)


def differentiated(apply):
  def loss(x, weights, gate_up, down, experts, slope):
    y, missed = apply((x, experts, weights), (gate_up, down))
    return (y * slope).sum(), (y, missed)

  return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def on_one_device(arrays, weights):
  flat = (a.reshape(-1, a.shape[-1]) for a in arrays)
  y = apply_experts(*flat, *weights)
  return y.reshape(arrays[0].shape), jnp.int32(0)


_wanted = differentiated(on_one_device)


def run(name: str) -> list[dict]:
  cfg = CASES[name]
  rows = 6 if name == 'odd_batch' else B
  D = 128 if name == 'float8' else 16
  rng = np.random.default_rng(1)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  x, slope = draw(rows, T, D), draw(rows, T, D)
  gate_up, down = draw(E, D, 2, F), draw(E, F, D)
  weights = jnp.abs(draw(rows, T, K))
  grid = mesh.make(cfg)
  using = sharding.Using(grid, cfg.rules, cfg.exchange)
  many = differentiated(
    lambda arrays, w: exchange.run(apply_experts, arrays, w, using)
  )
  out = []
  for skew in (1.0, 300.0):
    experts = routing(2, skew, rows)
    args = x, weights, gate_up, down, jnp.asarray(experts), slope
    if not out:
      many = many.lower(*args).compile()
    (_, (y, missed)), grads = many(*args)
    (_, (want, _)), wanted = _wanted(*args)
    gap = lambda a, b: float(jnp.abs(a - b).max() / jnp.abs(b).max())
    out.append(
      {
        'y': gap(y, want),
        'gradients': tiny.largest(map(gap, grads, wanted)),
        'missed': int(missed),
        'expected': expected_misses(experts, cfg) if rows == B else None,
        'sent': sent(many, D, cfg.devices),
        'planned': planned(cfg, D) if rows == B else None,
      }
    )
  return out


def main(names):
  patched = mock.patch.object(jax.lax, 'ragged_all_to_all', ragged_by_gathering)
  with patched:
    print(json.dumps({name: run(name) for name in names}))


if __name__ == '__main__':
  main(sys.argv[1:])
