"""Compiles training steps for meshes; prints what planner and XLA say of each.

python -m tests.plan.mesh_audit_worker CASE...

Cases have no axis of stages: those are programs of their own. Wires of data,
context and expert axes are compared on every mesh of these; those of fsdp and
tensor where the mesh has that axis alone, as XLA's partitioner mixes them with
others in ways of its own. The CPU carries bfloat16 as float32, but for the
exchange, which sends its bits.
"""

import dataclasses
import json
import math
import re
import sys

import jax

from deepseek_jax import plan
from deepseek_jax.model.transformer import build
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan import compiled
from deepseek_jax.plan import device_shares as mesh
from deepseek_jax.plan.compiled_collectives import collectives
from deepseek_jax.plan.wire import traffic as wire
from deepseek_jax.train.optimizer import OptimizerConfig
from tests import tiny
from tests.parallel import split_worker

SEQ_LEN = 16


def _wide(name):
  """Rows of 128, as float8 on the wire wants them."""
  return dataclasses.replace(tiny.config(name), dim=128)


def _with(attention):
  return dataclasses.replace(tiny.config('mla'), attention=attention)


def _remat(name, policy):
  config = tiny.config(name)
  compute = dataclasses.replace(config.compute, remat=policy)
  return dataclasses.replace(config, compute=compute)


def _case(
  config,
  micro_batch=1,
  exchange=None,
  moments='float32',
  accumulate=1,
  **sizes,
):
  return compiled.Program(
    config,
    MeshConfig(exchange=exchange or ExchangeConfig(), **sizes),
    SEQ_LEN,
    micro_batch,
    OptimizerConfig(moments=moments),
    accumulate,
  )


CASES = {
  'gqa_data': lambda: _case(tiny.config('gqa'), data=8),
  'moe_expert': lambda: _case(tiny.config('step'), expert=2),
  'remat_expert': lambda: _case(_remat('step', 'full'), expert=2),
  'mla_data': lambda: _case(tiny.config('mla'), 2, data=4, moments='bfloat16'),
  'v3_data': lambda: _case(tiny.config('v3'), data=4),
  'tied_data': lambda: _case(tiny.config('dense_mtp'), data=2),
  'mla_context': lambda: _case(tiny.config('mla'), context=4),
  'v3_context': lambda: _case(tiny.config('v3'), context=2, data=2),
  'gqa_context': lambda: _case(tiny.config('gqa'), context=2, data=2),
  'dsa_context': lambda: _case(_with(split_worker.DSA), context=4),
  'csa_context': lambda: _case(_with(split_worker.CSA), context=4),
  'hca_context': lambda: _case(_with(split_worker.HCA), context=2, data=2),
  'nsa_context': lambda: _case(_with(split_worker.NSA), context=4),
  'v3_expert': lambda: _case(
    tiny.config('v3'), exchange=ExchangeConfig(factor=1.5), expert=4
  ),
  'v3_float8': lambda: _case(
    _wide('v3'),
    exchange=ExchangeConfig(dispatch='float8', factor=1.0),
    expert=2,
    data=2,
  ),
  'v3_bfloat16': lambda: _case(
    tiny.config('v3'),
    exchange=ExchangeConfig(dispatch='bfloat16', combine='bfloat16'),
    expert=2,
  ),
  'v2_two_hop': lambda: _case(
    tiny.config('v2'),
    exchange=ExchangeConfig(kind='two_hop', nodes=2),
    expert=4,
  ),
  'dots_expert': lambda: _case(_remat('v3', 'dots'), expert=4),
  'remat_two_hop': lambda: _case(
    _remat('v2', 'full'),
    exchange=ExchangeConfig(kind='two_hop', nodes=2),
    expert=4,
  ),
  'mixed_expert': lambda: _case(tiny.config('mixed'), expert=4, data=2),
  'v3_expert_context': lambda: _case(
    tiny.config('v3'), expert=2, context=2, data=2
  ),
  'gqa_tensor': lambda: _case(tiny.config('gqa'), 2, tensor=2),
  'mla_tensor': lambda: _case(tiny.config('mla'), tensor=2),
  'moe_tensor': lambda: _case(tiny.config('moe16b'), tensor=2),
  'mtp_tensor': lambda: _case(tiny.config('dense_mtp'), tensor=2),
  'mha_tensor': lambda: _case(tiny.config('mha'), tensor=4),
  'mla_fsdp': lambda: _case(tiny.config('mla'), fsdp=4),
  'mtp_fsdp': lambda: _case(tiny.config('dense_mtp'), fsdp=2),
  'lite_fsdp': lambda: _case(tiny.config('lite'), fsdp=4),
  'gqa_accumulated': lambda: _case(tiny.config('gqa'), accumulate=4, data=2),
  'expert_accumulated': lambda: _case(
    _remat('step', 'full'), accumulate=2, expert=2
  ),
  'context_accumulated': lambda: _case(
    tiny.config('v3'), accumulate=2, context=2, data=2
  ),
  'tensor_accumulated': lambda: _case(
    tiny.config('mla'), accumulate=2, tensor=2
  ),
  'fsdp_accumulated': lambda: _case(
    tiny.config('dense_mtp'), accumulate=2, fsdp=2
  ),
  'fsdp_remat_accumulated': lambda: _case(
    _remat('dense_mtp', 'full'), accumulate=2, fsdp=2
  ),
  'moe16b_all': lambda: _case(
    tiny.config('moe16b'), expert=2, fsdp=2, tensor=2
  ),
}


def planned(program, state) -> dict:
  """The planner's figures; counters and the gate's state as they are."""
  grid = plan.Mesh(**{a: getattr(program.mesh, a) for a in mesh.AXES})
  held = mesh.shares(program.model, grid)
  shares = [s for found in held.values() for s in found]
  training = plan.Training(
    SEQ_LEN, program.micro_batch, optimizer=program.optimizer
  )
  bytes_ = plan.device_bytes(program.model, grid, training, held=held)[0]
  rest = (state.step, state.sequences, state.gate)
  small = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(rest))
  small += sum(4 for s in jax.tree.leaves(state.moments) if s.ndim == 0)
  rows = program.rows // program.mesh.ways('batch')
  wires = {
    w.purpose: w.bytes
    for w in plan.traffic(
      program.model, grid, training, batch=program.rows, held=held
    ).wires
  }
  out = {
    'parameters': sum(s.whole for s in shares),
    'arguments': bytes_['weights']
    + bytes_['moments']
    + small
    + 4 * rows * (SEQ_LEN + 1),  # tokens
    'gradients': sum(b for p, b in wires.items() if p.startswith('gradients')),
    'context': wires.get('context', 0),
    'context positions': wires.get('context positions', 0),
    'fsdp': wires.get('weights over fsdp', 0),
    'tensor': wires.get('tensor', 0),
    'exchange': 0,
  }
  if grid.expert > 1:
    tokens = program.micro_batch * SEQ_LEN // grid.context
    out['exchange'] = program.accumulate * wire.exchange_sent(
      program.model, program.mesh.exchange, devices=grid.expert, tokens=tokens
    )
  return out


def _sources(collective) -> list[str]:
  """Of each array: XLA names operations that it merged start/(one:another)."""
  parts = collective.source.split(':')
  if len(parts) != len(collective.arrays):
    return [collective.source] * len(collective.arrays)
  start = parts[0][: parts[0].rfind('/(')]
  return parts[:1] + [start + part for part in parts[1:]]


def measured(program, lowered, sizes, cut) -> dict:
  """What XLA made of the step; `sizes` are those of gradients, `cut` of those
  that fsdp cuts, whole."""
  done = lowered.compile({'xla_backend_optimization_level': 0})
  found = [
    c for c in collectives(done.as_text(), program.mesh.devices) if not c.maybe
  ]
  abstract = build(program.model).abstract
  reduced = sum(
    c._replace(arrays=(a,)).sent
    for c in found
    if c.kind == 'all-reduce'
    for a, source in zip(c.arrays, _sources(c))
    if a.dtype == 'f32'
    and math.prod(a.shape) in sizes
    and 'transpose(' in source  # statistics may have such sizes too
  )
  # The first layers' scope stands in the brackets of what is made of them.
  split = [c for c in found if re.search(r'attention\)*/shard_map', c.source)]
  at_least = 4 * program.micro_batch * SEQ_LEN  # a float32 per token
  sums = [
    c._replace(arrays=(a,))
    for c in found
    if c.kind == 'all-reduce' and c.source
    for a in c.arrays
    if a.bits // 8 >= at_least
  ]
  wire_of = lambda wanted: sum(
    c._replace(arrays=(a,)).sent
    for c in split
    if c.kind != 'all-reduce'
    for a in c.arrays
    if wanted(a)
  )
  return {
    'parameters': sum(math.prod(a.shape) for a in jax.tree.leaves(abstract)),
    'arguments': done.memory_analysis().argument_size_in_bytes,
    'gradients': reduced,
    'context': wire_of(lambda a: a.dtype[0] in 'bf'),
    'context positions': wire_of(lambda a: a.dtype[0] not in 'bf'),
    'exchange': sum(c.sent for c in found if 'all_to_all' in c.source),
    'tensor': sum(c.sent for c in sums),
    'fsdp': sum(
      c.sent for c in found if c.kind == 'all-gather' and c not in split
    )
    # XLA for CPUs scatters by all-reduces of which each device takes its part.
    + sum(c.sent // 2 for c in sums if math.prod(c.arrays[0].shape) in cut),
    'others': sorted(
      f'{c.kind} {c.sent} {c.source}'
      for c in found
      if c.sent > 64
      and c.kind not in ('all-reduce', 'all-to-all')
      and 'attention' not in c.source
    ),
  }


def gradient_sizes(program, state) -> tuple[set[int], set[int]]:
  """Elements of a parameter on a device, of a layer or of a stack of them; and
  of those that fsdp cuts on all."""
  grid = plan.Mesh(**{a: getattr(program.mesh, a) for a in mesh.AXES})
  every = [s for f in mesh.shares(program.model, grid).values() for s in f]
  cut = {s.elements * grid.fsdp for s in every if 'fsdp' in s.over}
  whole = {s.elements for s in every if 'fsdp' not in s.over}
  if cut & whole:
    raise AssertionError(f'sizes tell nothing apart: {cut & whole}')
  if not cut:
    shard = lambda a: math.prod(a.sharding.shard_shape(a.shape))
    whole |= {shard(a) for a in jax.tree.leaves(state.params)}
  return whole, cut


def case(name: str) -> dict:
  program = CASES[name]()
  lowered, state, _ = compiled.lower(program)
  return {
    'tensor': program.mesh.tensor == program.mesh.devices,
    'fsdp': program.mesh.fsdp == program.mesh.devices,
    'wires': program.mesh.fsdp == program.mesh.tensor == 1,
    'planned': planned(program, state),
    'measured': measured(program, lowered, *gradient_sizes(program, state)),
  }


if __name__ == '__main__':
  print(json.dumps({name: case(name) for name in sys.argv[1:]}))
