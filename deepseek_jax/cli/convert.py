"""Converts checkpoints between Hugging Face folders and this library's store.

python -m experiments.convert --from=HF_DIR --to=STORE_DIR --dtype=bfloat16
python -m experiments.convert --from=STORE_DIR --to=HF_DIR [--quantize=fp8]
python -m experiments.convert --from=runs/demo --to=HF_DIR

Memory stays bounded whatever the size of the checkpoint. After a kill the same
command goes on where it was; a folder that holds other work is refused. Files
of the tokenizer, the chat template and generation come along. The store is an
orbax checkpoint (STORE_DIR/variables), which deepseek_jax.hf.restore reads.
With --shard-to=expert=8,fsdp=2 the chunks follow that mesh, and each of
--processes reads only what it holds.
"""

import fnmatch
import os
import shutil
from collections.abc import Callable

from absl import flags
from rich.progress import (
  BarColumn,
  DownloadColumn,
  Progress,
  TimeRemainingColumn,
  TransferSpeedColumn,
)

from deepseek_jax.cli import common, experiment_file
from deepseek_jax.errors import InputError
from deepseek_jax.hf import chunks, identity, record, saving, source, store
from deepseek_jax.hf.source import Source
from deepseek_jax.run.export import export_run

_FROM = flags.DEFINE_string('from', None, 'Folder to read.', required=True)
_CONFIG = experiment_file.define_flag()
flags.declare_key_flag('config')
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

# Logical axis -> the mesh axis of --shard-to that shards it.
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
  'tokenizer*',
  'tiktoken*',
  '*tiktoken',
  '*.model',  # of sentencepiece and tiktoken
  'added_tokens.json',
  'special_tokens_map.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  'generation_config.json',
  'preprocessor_config.json',
  'processor_config.json',
  'chat_template*',
  'additional_chat_templates',
  'encoding',  # V3.2's and V4's own writing of a chat
  'tokenization_*.py',
  'encoding_*.py',
  'LICENSE*',
)
# Fields that describe the file read, not the one written.
_DROPPED = ('torch_dtype', 'dtype', 'auto_map', 'transformers_version')


def parse_mesh(text: str) -> dict[str, int]:
  """Returns the axis sizes of 'expert=8,fsdp=2', {'expert': 8, 'fsdp': 2}.

  Raises:
    InputError: an axis is unknown or a size no number above 0.
  """
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


def share() -> chunks.Share:
  """Returns this process's part of the work, from the flags."""
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
  return chunks.Share(mesh, RULES, process, processes)


def to_store(
  origin: Source, target: str, dtype: str, progress: Callable[[int, int], None]
) -> None:
  """Fills a store with a Hugging Face folder."""
  mine = share()
  notes = {
    'carried': origin.carried,
    'source': identity.of_folder(origin.folder),
  }
  store.create(target, origin.config, dtype, share=mine, notes=notes)
  store.Store(target).fill(origin.read, mine, progress)


def to_hf(
  origin: Source | store.Store,
  target: str,
  carried: dict,
  dtype: str,
  progress: Callable[[int, int], None],
) -> None:
  """Writes a Hugging Face folder from an opened Source or Store."""
  extra = {k: v for k, v in carried.items() if k not in _DROPPED}
  saving.write(
    target,
    origin.config,
    origin.read,
    saving.Format(dtype, _QUANTIZE.value),
    extra=extra,
    source=_identity(origin),
    progress=progress,
  )


def _identity(origin: Source | store.Store) -> dict:
  """Returns what identifies the numbers of an origin, as JSON values."""
  if isinstance(origin, store.Store):
    return origin.source()
  return {'folder': identity.of_folder(origin.folder)}


def convert(
  folder: str, target: str, progress: Callable[[int, int], None]
) -> None:
  """Converts `folder` to `target` as the flags ask.

  Raises:
    InputError: a folder is missing, the same, or of the wrong kind.
  """
  if not os.path.isdir(folder):
    raise InputError(f'--from={folder}: {source.absent(folder)}')
  if os.path.exists(target) and os.path.samefile(folder, target):
    raise InputError(f'--to={target}: is the folder of --from')
  if os.path.isdir(os.path.join(folder, 'checkpoints')):
    export_run(folder, target, dtype=_DTYPE.value, quantize=_QUANTIZE.value)
    return
  if os.path.exists(os.path.join(folder, store.MODEL)):
    origin, kind = store.Store(folder), 'hf'
    carried, dtype = origin.notes.get('carried', {}), origin.dtype
  else:
    origin, kind = Source(folder, mtp=None), 'store'
    carried, dtype = origin.carried, 'bfloat16'
    for line in source.summary(origin.unused):
      print(line)
  kind = kind if _AS.value == 'other' else _AS.value
  dtype = _DTYPE.value or dtype
  if kind == 'hf':
    to_hf(origin, target, carried, dtype, progress)
  elif isinstance(origin, store.Store):
    raise InputError(f'--as=store: {folder} is one already')
  else:
    to_store(origin, target, dtype, progress)
  copy_along(folder, target)


def copy_along(folder: str, target: str) -> None:
  """Copies the files beside the weights, each whole or not at all."""
  for name in sorted(os.listdir(folder)):
    if not any(fnmatch.fnmatch(name, pattern) for pattern in _ALONG):
      continue
    path = os.path.join(folder, name)
    if os.path.isdir(path):
      shutil.copytree(path, os.path.join(target, name), dirs_exist_ok=True)
      continue
    part = record.scratch(os.path.join(target, name))
    shutil.copyfile(path, part)
    os.replace(part, os.path.join(target, name))


def main(argv: list[str]) -> None:
  """Runs the conversion with a progress bar."""
  del argv
  experiment_file.load_flag(_CONFIG)
  columns = (
    BarColumn(),
    DownloadColumn(binary_units=True),
    TransferSpeedColumn(),
    TimeRemainingColumn(),
  )
  folder, target = map(os.path.expanduser, (_FROM.value, _TO.value))
  with Progress(*columns) as bar:
    task = bar.add_task('convert', total=None)

    def progress(done: int, total: int) -> None:
      bar.update(task, completed=done, total=total)

    convert(folder, target, progress)
  print(f'{target}: complete')


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names=None)
