"""Says what a run is before its first step: data, model, memory, mesh."""

from collections.abc import Iterator

import jax

from deepseek_jax import data as datalib
from deepseek_jax import plan
from deepseek_jax.cli import run_plan
from deepseek_jax.errors import InputError
from deepseek_jax.parallel import processor
from deepseek_jax.run.config import RunConfig


def lines(config: RunConfig, store: datalib.TokenStore) -> Iterator[str]:
  """Yields the first lines of a run whose text is tokenised."""
  train, held = store.index['train'], store.index['heldout']
  files = store.index.get('corpus_files')  # a store of before has none
  paths = ', '.join(config.data.paths)
  read = f'{paths}: {files:,} files' if files else paths
  yield (
    f'data: {read}, {train["documents"]:,} documents,'
    f' {train["tokens"]:,} tokens to train on;'
    f' {held["documents"]:,} held out ({held["bytes"]:,} bytes)'
  )
  about = store.index['tokenizer']
  yield f'tokenizer: {about["kind"]}, {about["vocab_size"]:,} tokens'
  count = plan.count_parameters(config.model)
  yield f'model: {count.total:,} parameters, {count.active:,} of them active'
  batch = config.train.batch
  epochs = config.train.tokens / max(train['tokens'], 1)
  yield (
    f'steps: {config.steps:,} of {batch.size} x {config.data.seq_len} tokens,'
    f' {epochs:.2g} epochs; schedule {config.train.schedule.kind}'
  )
  yield f'memory: {_memory(config)}'
  device = jax.local_devices()[0]
  yield f'devices: {config.mesh.spread or "one"}, {device.device_kind}'
  compute = config.model.compute
  xla = processor.options('train', compute.xla)
  yield f'processor: {processor.described(xla, compute.products)}'


def _memory(config: RunConfig) -> str:
  """Returns the bytes of a device by the plan, or why there is none."""
  made = run_plan.plan_of(config)
  try:
    each = plan.device_bytes(made.model, made.recipe.mesh, made.recipe.training)
  except InputError as error:  # the planner knows no layers of one's own
    return f'not planned ({error})'
  most = max(each, key=lambda classes: sum(classes.values()))
  parts = ', '.join(f'{n} {_size(b)}' for n, b in most.items() if b)
  return f'{_size(sum(most.values()))} a device by the plan ({parts})'


def _size(size: int) -> str:
  """Returns bytes for people."""
  for unit, one in (('GiB', 2**30), ('MiB', 2**20)):
    if size >= one:
      return f'{size / one:.3g} {unit}'
  return f'{size / 2**10:.3g} KiB'
