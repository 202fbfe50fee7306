"""Compiles every kernel for an H200 and reads the machine code.

  JAX_PLATFORMS=cpu python -m pallas_kernels.aot [--only=NAME,NAME] [--out=DIR]

Needs jax[cuda13], nvidia-cuda-nvdisasm and nvidia-cuda-cuobjdump, but no GPU.
Writes one JSON per jax version and a table of all of them; exits 1 if a kernel
spills registers, drew a warning that costs speed, or lost its wgmma.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from pallas_kernels import aot_cases, quantize

P = jax.sharding.PartitionSpec
_ENV = ('MOSAIC_GPU_DUMP_PTX', 'MOSAIC_GPU_DUMP_PTXAS', 'MOSAIC_GPU_DUMP_SASS')
_ROUNDING = 'xla_rounds_float8'  # the row of `lost_rounding`
# Of ptxas, whose numbers for these change.
_COSTLY = ("'setmaxnreg' ignored", 'instructions are serialized')

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000
  l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


def compile_for_h200(fn: Callable, args: tuple) -> jax.stages.Compiled:
  """Returns fn lowered and compiled for args, a tuple of (shape, dtype)."""
  topology = topologies.get_topology_desc(
    platform='cuda', target_config=H200, topology='1x1x1'
  )
  mesh = jax.sharding.Mesh(np.array(topology.devices), ('aot',))
  device = jax.sharding.AbstractDevice('NVIDIA H200', 132, 'cuda')
  place = jax.sharding.NamedSharding(mesh, P())
  specs = [jax.ShapeDtypeStruct(s, d, sharding=place) for s, d in args]
  with jax.sharding.use_abstract_mesh(
    mesh.abstract_mesh.update(abstract_device=device)
  ):
    return jax.jit(fn).lower(*specs).compile()


def read_dump(folder: pathlib.Path) -> list[dict]:
  """Returns one record per kernel that was compiled into the folder."""
  records = []
  for log in sorted(folder.glob('*.ptxas')):
    text = log.read_text(errors='replace')
    stem = log.name.removesuffix('.ptxas')
    sass = ''.join(
      f.read_text(errors='replace') for f in folder.glob(stem + '*.sass*')
    )
    resources = ''.join(
      f.read_text(errors='replace') for f in folder.glob(stem + '*.resources*')
    )
    records.append(_record(text, sass, resources))
  return records


def _record(ptxas: str, sass: str, resources: str) -> dict:
  """Reads registers, spills, memory and instructions of one kernel."""
  number = lambda pattern, text: max(
    (int(n) for n in re.findall(pattern, text)), default=None
  )
  return {
    'registers': number(r'Used (\d+) registers', ptxas),
    'spill_bytes': number(r'(\d+) bytes spill (?:stores|loads)', ptxas),
    'local_ops': len(re.findall(r'\b(?:STL|LDL)\b', sass)),
    'smem': number(r'(?i)smem\D*(\d+)', resources),
    'wgmma': len(re.findall(r'\b(?:HGMMA|QGMMA)\b', sass)),
    'tma': len(re.findall(r'\b(?:UTMALDG|UTMASTG|UBLKCP)\b', sass)),
    'warnings': [w for w in _COSTLY if w in ptxas],
  }


def compile_case(
  case: aot_cases.KernelCase, folder: pathlib.Path
) -> list[dict]:
  """Compiles with the dumps in an empty folder and reads them."""
  os.environ['MOSAIC_GPU_DUMP_TO'] = str(folder)
  os.environ.update(dict.fromkeys(_ENV, '1'))
  compile_for_h200(case.fn, case.args)
  return read_dump(folder)


def faults(case: aot_cases.KernelCase, records: list[dict]) -> list[str]:
  """Returns the reasons for which a compiled case fails; none is best."""
  found = [] if records else ['no kernel was compiled']
  for r in records:
    if r['spill_bytes'] or r['local_ops']:
      found.append(f'spills {r["spill_bytes"]} bytes')
    found += r['warnings']
  if case.wgmma and not any(r['wgmma'] for r in records):
    found.append('no wgmma')
  return found


def lost_rounding() -> list[str]:
  """Returns what XLA optimises away that must not be; none is best.

  Of a conversion to a narrow format and back it keeps neither, as it may by
  xla_allow_excess_precision, unless something stands between the two.
  """

  def there_and_back(x: jax.Array) -> jax.Array:
    q, scales = quantize.quantize(x, impl='reference')
    return quantize.dequantize(q, scales)

  program = compile_for_h200(there_and_back, (((256, 256), jnp.float32),))
  kept = 'f8e4m3fn[' in program.as_text()
  return [] if kept else ['float8 is not rounded']


def table(results: dict[str, dict]) -> str:
  """Renders {jax version: {case: {'kernels', 'faults'}}} as Markdown."""
  columns = ('registers', 'spill_bytes', 'smem', 'wgmma', 'tma')
  head = ('kernel', 'jax', *columns, 'faults', 'date')
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  names = dict.fromkeys(n for cases in results.values() for n in cases)
  for name in names:
    for version, cases in results.items():
      if name not in cases:
        continue
      case = cases[name]
      cells = [' + '.join(str(k[c]) for k in case['kernels']) for c in columns]
      bad = ', '.join(case['faults']) or 'none'
      date = case.get('date', '')
      lines.append(f'| {" | ".join([name, version, *cells, bad, date])} |')
  return '\n'.join(lines) + '\n'


_HEAD = """# Kernels compiled for H200

Written by `python -m pallas_kernels.aot` on a machine without a GPU: compiled
to machine code, not run and not timed. Several kernels in one call are joined
by + (one that an earlier case compiled is left out); smem is in bytes of
232448, None where that jax version doesn't say; wgmma and tma count
instructions. Rows without a date are older than 2026-11-29, and may be of
sources that have changed since.

"""


def main(argv: list[str]) -> int:
  """Compiles the cases, writes both files, returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--only', default='', help='prefixes, with commas')
  parser.add_argument('--out', default='benchmarks/results')
  parser.add_argument('--dump', help='keep PTX and SASS in this folder')
  flags = parser.parse_args(argv)
  out = pathlib.Path(flags.out)
  out.mkdir(parents=True, exist_ok=True)
  store = out / f'aot-{jax.__version__}.json'
  done = json.loads(store.read_text()) if flags.only and store.exists() else {}
  today = datetime.date.today().isoformat()
  if _ROUNDING.startswith(tuple(flags.only.split(','))):
    found = lost_rounding()
    done[_ROUNDING] = {'kernels': [], 'faults': found, 'date': today}
    print(_ROUNDING, done[_ROUNDING], flush=True)
  bad = bool(done.get(_ROUNDING, {}).get('faults'))
  for name, case in aot_cases.CASES.items():
    if not name.startswith(tuple(flags.only.split(','))):
      continue
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(flags.dump or scratch) / name
      folder.mkdir(parents=True, exist_ok=True)
      records = compile_case(case, folder)
    done[name] = {
      'kernels': records,
      'faults': faults(case, records),
      'date': today,
    }
    bad += bool(done[name]['faults'])
    print(name, done[name], flush=True)
  store.write_text(json.dumps(done, indent=1) + '\n')
  results = {
    f.stem.removeprefix('aot-'): json.loads(f.read_text())
    for f in sorted(out.glob('aot-*.json'))
  }
  (out / 'aot.md').write_text(_HEAD + table(results))
  return 1 if bad else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
