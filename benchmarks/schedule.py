"""Tells which dispatch and combine run beside compute, on eight H200.

  JAX_PLATFORMS=cpu python -m benchmarks.schedule [--kind=two_hop] [--out=DIR]

Compiles the training step of two MoE layers of DeepSeek-V3 for GPUs that are
not there, with XLA's latency-hiding scheduler, and reads the order in which it
issues collectives and compute. Needs jax[cuda13], and no GPU. What stays
exposed is a statement on that order, at rates of the data sheet: not timed.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
from jax.experimental import topologies

import deepseek_jax as ds
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan import compiled, hardware
from deepseek_jax.plan.schedule import Rates, Timed, exposed_share, schedule
from pallas_kernels.aot import H200

DEVICES = 8
OPTIONS = {'xla_gpu_enable_latency_hiding_scheduler': True}
# Layers as V3's; a small vocabulary, as the head is not what is asked about.
LAYERS, VOCAB = 2, 4096


def program(exchange: ExchangeConfig) -> compiled.Program:
  """Returns the step of V3's MoE layers on an expert mesh."""
  model = ds.presets.v3()
  model = dataclasses.replace(
    model,
    vocab_size=VOCAB,
    layout=((('moe',), LAYERS),),
    mtp=dataclasses.replace(model.mtp, depth=0),
    compute=dataclasses.replace(model.compute, dtype='bfloat16'),
  )
  mesh = MeshConfig(expert=DEVICES, exchange=exchange)
  return compiled.Program(model, mesh, seq_len=4096)


def compile_for_h200(asked: compiled.Program) -> str:
  """Returns the scheduled program as text."""
  topology = topologies.get_topology_desc(
    platform='cuda', target_config=H200, topology=f'1x1x{DEVICES}'
  )
  lowered, _, _ = compiled.lower(asked, topology.devices)
  return lowered.compile(OPTIONS).as_text()


def rates() -> Rates:
  """Returns what an H200 does at its peaks, over NVLink."""
  device = hardware.cluster('h200x8').accelerator
  return Rates(
    device.bf16.value, device.memory_bandwidth.value, device.fast.value
  )


def summed(found: tuple[Timed, ...]) -> list[dict]:
  """Returns a row for each kind of transfer: how many, how long, exposed."""
  groups = collections.defaultdict(list)
  for one in found:
    groups[one.scope or 'other collectives', one.asynchronous].append(one)
  return [
    {
      'what': what,
      'asynchronous': beside,
      'count': sum(t.collective.times for t in some),
      'sent': sum(t.collective.sent for t in some),
      'wire': sum(t.wire for t in some),
      'exposed': sum(t.exposed for t in some),
    }
    for (what, beside), some in sorted(groups.items())
  ]


def table(result: dict) -> str:
  """Renders a result as Markdown."""
  head = '| transfer | issued | times | MB | link, µs | exposed, µs |'
  lines = [head, '|---' * 6 + '|']
  for row in result['rows']:
    issued = 'asynchronous' if row['asynchronous'] else 'synchronous'
    numbers = row['sent'] / 1e6, 1e6 * row['wire'], 1e6 * row['exposed']
    cells = (
      row['what'],
      issued,
      str(row['count']),
      *map('{:,.1f}'.format, numbers),
    )
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


_HEAD = """# Expert exchange beside compute

Written by `python -m benchmarks.schedule` without a GPU: the training step of
{layers} MoE layers of DeepSeek-V3, 4096 tokens a device, over {devices} H200
that share the experts, in the order of XLA's latency-hiding scheduler (jax
{jax}). The share that stays exposed follows from that order, at peak rates of
the data sheet; nothing was run or timed. The time of further rounds, which even
loads don't need, is left out. Dispatch is float8, combine bfloat16; a
dispatch's gradient is a combine.

"""


def main(argv: list[str]) -> int:
  """Compiles, reads and writes both files."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--kind', default='all_to_all', help='of the exchange')
  parser.add_argument('--out', default='benchmarks/results')
  flags = parser.parse_args(argv)
  exchange = ExchangeConfig(
    flags.kind, dispatch='float8', nodes=2 if flags.kind == 'two_hop' else 1
  )
  found = schedule(compile_for_h200(program(exchange)), DEVICES, rates())
  moved = [t for t in found if t.scope]
  result = {
    'jax': jax.__version__,
    'kind': flags.kind,
    'rows': summed(found),
    'exposed_share': exposed_share(moved),
  }
  out = pathlib.Path(flags.out)
  store = out / 'schedule.json'
  done = json.loads(store.read_text()) if store.exists() else {}
  done[flags.kind] = result
  store.write_text(json.dumps(done, indent=1) + '\n')
  text = _HEAD.format(layers=LAYERS, devices=DEVICES, jax=jax.__version__)
  for kind, made in done.items():
    share = made['exposed_share']
    text += f'## {kind}\n\n{table(made)}\n'
    text += f'At most {share:.0%} of dispatch and combine stays exposed.\n\n'
  (out / 'schedule.md').write_text(text.rstrip() + '\n')
  print(table(result) + f'exposed: at most {result["exposed_share"]:.1%}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
