"""From which length on is sparse attention cheaper than dense, on this CPU?

    python -m benchmarks.sparse [--lengths=1024,2048] [--rounds=3]

One layer of each kind, of the same model width, reads one sequence: dense MLA,
DSA (V3.2: the indexer's best k tokens) and CSA (V4: a window and the best k of
entries of four tokens). `forward` is evaluation; `step` is a training forward
and backward, with the indexers' own losses. Times are medians of rounds in
which all layers take turns; memory is what XLA's program holds at its peak
beside weights and input. Writes sparse.json, sparse.md and sparse.png.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.indexer import IndexerConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.context import Context

LENGTHS = (1024, 2048, 4096, 8192, 16384)
DIM = 512
MLA = MLAConfig(
  heads=8, q_rank=256, kv_rank=128, nope_dim=64, rope_dim=32, v_dim=64
)
LAYERS = {
  'MLA': MLA,
  'DSA': DSAConfig(
    **{f.name: getattr(MLA, f.name) for f in dataclasses.fields(MLA)},
    indexer=IndexerConfig(heads=4, dim=32),
    top_k=256,
    block=32,
  ),
  'CSA': SharedKVConfig(
    heads=8,
    head_dim=96,
    rope_dim=32,
    q_rank=256,
    groups=2,
    o_rank=128,
    compress='csa',
    csa=CSAConfig(top_k=128, index_heads=4, index_dim=32, block=32),
  ),
}
PASSES = ('forward', 'step')


def programs(cfg, length: int) -> dict:
  """Compiled calls of a layer, each with its arguments."""
  module = cfg.build(DIM, std=0.02, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(module)
  x = np.random.default_rng(0).normal(size=(1, length, DIM))
  x = jnp.asarray(x, jnp.float32)
  at = jnp.arange(length)[None]

  def run(state, x, train):
    ctx = Context(at * 0, at, None, train=train)
    y, _, stats = nnx.merge(graphdef, state)(x, ctx)
    return y, stats

  def loss(state, x):
    y, stats = run(state, x, True)
    return (y * y).mean() + stats.get('loss', 0.0)

  calls = {
    'forward': lambda state, x: run(state, x, False)[0],
    'step': jax.grad(loss, argnums=(0, 1)),
  }
  return {
    name: (jax.jit(call).lower(state, x).compile(), (state, x))
    for name, call in calls.items()
  }


def peak(compiled) -> int:
  """Bytes of temporaries and results."""
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes + memory.output_size_in_bytes


def seconds(compiled, arguments) -> float:
  start = time.perf_counter()
  jax.block_until_ready(compiled(*arguments))
  return time.perf_counter() - start


def measure(length: int, rounds: int) -> list[dict]:
  """A record for each layer and pass at one length."""
  made = {
    (layer, name): call
    for layer, cfg in LAYERS.items()
    for name, call in programs(cfg, length).items()
  }
  times = {key: [] for key in made}
  for _ in range(rounds + 1):
    for key, call in made.items():
      times[key].append(seconds(*call))
  return [
    {
      'layer': layer,
      'pass': name,
      'length': length,
      # The first round warms up.
      'seconds': statistics.median(times[layer, name][1:]),
      'rounds': times[layer, name][1:],
      'bytes': peak(made[layer, name][0]),
    }
    for layer, name in made
  ]


def curve(records, layer: str, name: str, what: str) -> dict[int, float]:
  """length -> value."""
  picked = [r for r in records if (r['layer'], r['pass']) == (layer, name)]
  return {r['length']: r[what] for r in picked}


def crossover(dense: dict[int, float], sparse: dict[int, float]):
  """The length from which on sparse is the cheaper one; None: not measured.

  Between lengths both costs are taken for powers of the length. 0: always.
  """
  lengths = sorted(dense)
  ahead = [math.log(dense[n] / sparse[n]) for n in lengths]
  if ahead[-1] <= 0:
    return None
  behind = [i for i, a in enumerate(ahead) if a <= 0]
  if not behind:
    return 0
  i = behind[-1]
  share = -ahead[i] / (ahead[i + 1] - ahead[i])
  first, last = math.log(lengths[i]), math.log(lengths[i + 1])
  return round(math.exp(first + share * (last - first)))


def crossovers(records) -> dict:
  """{'DSA forward seconds': length, ...}."""
  return {
    f'{layer} {name} {what}': crossover(
      curve(records, 'MLA', name, what), curve(records, layer, name, what)
    )
    for layer in LAYERS
    if layer != 'MLA'
    for name in PASSES
    for what in ('seconds', 'bytes')
  }


def slope(values: dict[int, float]) -> float:
  """The power of the length by which the last doubling grew."""
  before, last = sorted(values)[-2:]
  return math.log(values[last] / values[before]) / math.log(last / before)


def _digits(value: float) -> str:
  return f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def table(records) -> str:
  """Markdown: a row per length and pass."""
  lengths = sorted({r['length'] for r in records})
  units = {'seconds': ('ms', 1e3), 'bytes': ('MiB', 2.0**-20)}
  head = [f'{layer} {unit}' for unit, _ in units.values() for layer in LAYERS]
  lines = ['| pass | T | ' + ' | '.join(head) + ' |']
  lines.append('|---' * (len(head) + 2) + '|')
  for name in PASSES:
    for n in lengths:
      cells = [
        _digits(curve(records, layer, name, what)[n] * factor)
        for what, (_, factor) in units.items()
        for layer in LAYERS
      ]
      lines.append(f'| {name} | {n} | ' + ' | '.join(cells) + ' |')
    if len(lengths) > 1:
      cells = [
        f'T^{slope(curve(records, layer, name, what)):.2f}'
        for what in units
        for layer in LAYERS
      ]
      lines.append(f'| {name} | grows as | ' + ' | '.join(cells) + ' |')
  said = {None: 'not reached', 0: 'at every length'}
  lines += [
    '',
    'Cheaper than MLA from T = (between lengths by power laws):',
    '',
  ]
  for what, length in crossovers(records).items():
    lines.append(f'- {what}: {said.get(length, length)}')
  return '\n'.join(lines) + '\n'


def plot(records, path: pathlib.Path) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6))
  units = (('seconds', 's', 1.0), ('bytes', 'MiB', 2.0**-20))
  for panel, (what, unit, factor) in zip(axes, units):
    for color, layer in enumerate(LAYERS):
      for name, style in zip(PASSES, ('-', '--')):
        values = curve(records, layer, name, what)
        panel.plot(
          list(values),
          [v * factor for v in values.values()],
          f'o{style}',
          color=f'C{color}',
          label=f'{layer}, {name}',
          markersize=3,
        )
    panel.set_xscale('log', base=2)
    panel.set_yscale('log')
    panel.set_xlabel('T, tokens of the sequence')
    panel.set_ylabel(f'{what}, {unit}' if what == 'bytes' else what)
    panel.grid(alpha=0.3)
  axes[0].legend(fontsize=7)
  figure.tight_layout()
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def write(records, out: pathlib.Path) -> None:
  """sparse.json, sparse.md and sparse.png in folder `out`."""
  out.mkdir(parents=True, exist_ok=True)
  report = {
    'jax': jax.__version__,
    'device': jax.devices()[0].device_kind,
    'machine': platform.machine(),
    'dim': DIM,
    'layers': {k: dataclasses.asdict(v) for k, v in LAYERS.items()},
    'records': records,
    'crossover': crossovers(records),
  }
  (out / 'sparse.json').write_text(json.dumps(report, indent=1) + '\n')
  (out / 'sparse.md').write_text(table(records))
  plot(records, out / 'sparse.png')


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  whole = lambda text: tuple(int(n) for n in text.split(','))
  parser.add_argument('--lengths', type=whole, default=LENGTHS)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', default='benchmarks/results')
  options = parser.parse_args(arguments)
  if min(options.lengths) < 8 or options.rounds < 1:
    print('--lengths: at least 8 each; --rounds: at least 1', file=sys.stderr)
    return 2
  records = []
  for length in sorted(set(options.lengths)):
    records += measure(length, options.rounds)
    for r in records[-len(LAYERS) * len(PASSES) :]:
      print(
        f'{r["layer"]} {r["pass"]:<7} T={length:<6} {r["seconds"] * 1e3:9.1f}'
        f' ms {r["bytes"] / 2**20:9.1f} MiB',
        flush=True,
      )
  write(records, pathlib.Path(options.out))
  print(table(records))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
