"""Converts checkpoints between Hugging Face folders and this library's store.

python -m experiments.convert --from=HF_DIR --to=STORE_DIR --dtype=bfloat16
python -m experiments.convert --from=STORE_DIR --to=HF_DIR [--quantize=fp8]
python -m experiments.convert --from=runs/demo --to=HF_DIR

Memory stays bounded whatever the size of the checkpoint. After a kill the same
command goes on where it was. The store is an orbax checkpoint (STORE_DIR/
variables), which deepseek_jax.hf.restore reads. With --shard-to=expert=8,fsdp=2
the chunks follow that mesh, and each of --processes reads only what it holds.
"""

import json
import os
import shutil

from absl import flags
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TimeRemainingColumn,
  TransferSpeedColumn,
)

from deepseek_jax import hf
from deepseek_jax.data import boundaries
from deepseek_jax.errors import InputError
from deepseek_jax.hf import saving, store
from deepseek_jax.hf.source import Source, fingerprint
from deepseek_jax.run import fit as loop
from experiments import common

_FROM = flags.DEFINE_string('from', None, 'Folder to read.', required=True)
_TO = flags.DEFINE_string('to', None, 'Folder to write.', required=True)
_AS = flags.DEFINE_enum(
  'as',
  'other',
  ['other', 'hf', 'store'],
  'What to write; other: a store from a Hugging Face folder, and back.',
)
_DTYPE = flags.DEFINE_enum(
  'dtype',
  None,
  ['float32', 'bfloat16'],
  'Of the weights written; default bfloat16, or that of the store.',
)
_QUANTIZE = flags.DEFINE_enum(
  'quantize',
  None,
  ['fp8', 'fp8_ue8m0'],
  'Write matrices as float8 with a scale per block (Hugging Face only).',
)
_SHARD_TO = flags.DEFINE_string(
  'shard-to', '', 'Mesh that will load the store, such as expert=8,fsdp=2.'
)
_PROCESS = flags.DEFINE_integer(
  'process', 0, 'Number of this process, of --processes.'
)
_PROCESSES = flags.DEFINE_integer(
  'processes', 1, 'Processes that convert into one store together.'
)

# The mesh axes that --shard-to may name, and what they cut.
RULES = {
  'experts': 'expert',
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
}

# Files beside the weights that a conversion takes along.
_ALONG = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'generation_config.json',
  'chat_template.jinja',
)
# Of the file that was read, not of the one that is written.
_DROPPED = ('torch_dtype', 'dtype', 'auto_map', 'transformers_version')


def parse_mesh(text: str) -> dict[str, int]:
  """'expert=8,fsdp=2' -> {'expert': 8, 'fsdp': 2}."""
  out = {}
  for part in filter(None, text.split(',')):
    name, _, size = part.partition('=')
    if name not in RULES.values() or not size.isdecimal() or int(size) < 1:
      axes = sorted(set(RULES.values()))
      raise InputError(
        f'--shard-to={text}: {part!r}: write AXIS=SIZE with AXIS of {axes}'
      )
    out[name] = int(size)
  return out


def share() -> store.Share:
  """This process's part of the work, from the flags."""
  processes, process = _PROCESSES.value, _PROCESS.value
  mesh = parse_mesh(_SHARD_TO.value)
  devices = 1
  for size in mesh.values():
    devices *= size
  if not 0 <= process < processes:
    raise InputError(f'--process={process}: must lie in 0..{processes - 1}')
  if devices % processes:
    raise InputError(
      f'--processes={processes}: must divide the {devices} devices of'
      f' --shard-to={_SHARD_TO.value!r}'
    )
  return store.Share(mesh, RULES, process, processes)


def to_store(origin: Source, target: str, dtype: str, progress) -> None:
  """Fills a store with a Hugging Face folder."""
  mine = share()
  notes = {
    'carried': origin.carried,
    'source': fingerprint(origin.folder),
  }
  store.create(target, origin.config, dtype, share=mine, notes=notes)
  store.Store(target).fill(origin.read, mine, progress)


def to_hf(origin, target: str, carried: dict, dtype: str, progress) -> None:
  """Writes a Hugging Face folder from an opened Source or Store."""
  extra = {k: v for k, v in carried.items() if k not in _DROPPED}
  wanted = saving.Format(dtype, _QUANTIZE.value)
  saving.write(
    target, origin.config, origin.read, wanted, extra=extra, progress=progress
  )


def run_to_hf(workdir: str, target: str) -> None:
  """Exports the newest checkpoint of a training run, and its tokenizer."""
  run = loop.load(workdir)
  tokenizer = run.tokenizer
  extra = {
    'eos_token_id': tokenizer.eos_id,
    'bos_token_id': None,  # documents only end
    'pad_token_id': tokenizer.pad_id,
  }
  if run.config.model.attention.rope.scaling is None:
    extra['max_position_embeddings'] = run.config.data.seq_len
  hf.save(
    target,
    run.config.model,
    run.variables,
    dtype=_DTYPE.value,
    quantize=_QUANTIZE.value,
    extra=extra,
  )
  tokenizer.save(target)
  ends = list(boundaries.of_run(tokenizer).ends)
  about = {'eos_token_id': ends, 'pad_token_id': tokenizer.pad_id}
  path = os.path.join(target, 'generation_config.json')
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(about, file, indent=2)


def convert(source: str, target: str, progress) -> None:
  """Does what the flags say."""
  if not os.path.isdir(source):
    raise InputError(f'--from={source}: is no folder')
  if os.path.isdir(os.path.join(source, 'checkpoints')):
    run_to_hf(source, target)
    return
  if os.path.exists(os.path.join(source, store.MODEL)):
    origin, kind = store.Store(source), 'hf'
    carried, dtype = origin.notes.get('carried', {}), origin.dtype
  else:
    origin, kind = Source(source, mtp=None), 'store'
    carried, dtype = origin.carried, 'bfloat16'
    for name, why in origin.unused.items():
      print(f'{name} is not used: it {why}')
  kind = kind if _AS.value == 'other' else _AS.value
  dtype = _DTYPE.value or dtype
  if kind == 'hf':
    to_hf(origin, target, carried, dtype, progress)
  elif isinstance(origin, store.Store):
    raise InputError(f'--as=store: {source} is one already')
  else:
    to_store(origin, target, dtype, progress)
  for name in _ALONG:
    file = os.path.join(source, name)
    if os.path.isfile(file):
      shutil.copyfile(file, os.path.join(target, name))


def main(argv):
  del argv
  columns = (
    BarColumn(),
    DownloadColumn(binary_units=True),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  source, target = map(os.path.expanduser, (_FROM.value, _TO.value))
  with Progress(*columns) as bar:
    task = bar.add_task('convert', total=None)

    def progress(done, total):
      bar.update(task, completed=done, total=total)

    convert(source, target, progress)
  print(f'{target}: complete')


if __name__ == '__main__':
  common.launch(main)
