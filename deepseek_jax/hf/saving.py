"""Saves configuration and variables as a Hugging Face folder.

The work goes tensor by tensor and row by row, so a model never has to fit in
memory twice, or at all (`write` takes any source of regions). A shard file
appears complete under its name or not at all; what a killed run finished is not
done again, and never taken for the work of another (see `record`).
"""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.config import dtype_name
from deepseek_jax.errors import InputError, told
from deepseek_jax.hf import (
  config_render,
  families,
  fp8,
  names,
  record,
  safetensors_io,
)
from deepseek_jax.hf.families.family import Family
from deepseek_jax.hf.names import Leaf, Part
from deepseek_jax.hf.source import Read
from deepseek_jax.model.merging import merged
from deepseek_jax.model.transformer_config import TransformerConfig

_SCALE = '_scale_inv'
STEP = 1 << 24  # numbers handled at once


class Format(NamedTuple):
  """Describes how a folder is written.

  Attributes:
    dtype: of the tensors, 'float32', 'bfloat16' or 'float16'; selection biases
      stay float32, as released.
    quantize: None; 'fp8' for V3's block-quantised matrices; 'fp8_ue8m0' for
      V3.1's, whose scales are powers of two.
    shard_bytes: a file is closed when it would grow beyond.
  """

  dtype: str
  quantize: str | None = None
  shard_bytes: int = 5 << 30


class Stored(NamedTuple):
  """Describes one tensor of the folder to be."""

  name: str
  part: Part
  dtype: np.dtype
  quantize: str | None

  def tensors(self) -> dict[str, tuple]:
    """Returns its entries in a file's header: name -> (dtype, shape)."""
    shape = self.part.leaf.theirs
    if not self.quantize:
      return {self.name: (self.dtype, shape)}
    scale = (np.dtype(np.float32), fp8.scale_shape(shape))
    return {self.name: (fp8.E4M3, shape), self.name + _SCALE: scale}

  @property
  def nbytes(self) -> int:
    """Returns the bytes of the tensor, scales included."""
    return sum(
      int(np.prod(shape)) * dtype.itemsize
      for dtype, shape in self.tensors().values()
    )


def save(
  path: str,
  config: TransformerConfig,
  variables: Mapping[str, Any],
  *,
  dtype: str | None = None,
  quantize: str | None = None,
  extra: Mapping[str, Any] | None = None,
  source: Any = None,
) -> None:
  """Writes a folder that transformers, vLLM and SGLang read.

  Args:
    path: folder; made if missing, files of the same names are replaced.
    config: of the model.
    variables: {'params': ..., 'buffers': ...}; MTP layers are written too, and
      adapters are folded into their weights.
    dtype: of the file, by default that of the embedding.
    quantize: see Format.
    extra: fields of config.json that don't change the model: eos_token_id,
      bos_token_id, pad_token_id, max_position_embeddings ...
    source: JSON values that identify the variables. With them a folder of
      other work is refused, and a killed run of the same work is resumed.

  Raises:
    InputError: the family of the model can't express it, or an array has
      another shape than the configuration says.
  """
  if not isinstance(path, str | os.PathLike):
    raise InputError(f'path: is {told(path)}; give a folder, then the config')
  config, variables = merged(config, variables)
  arrays = {leaf.path: _array(variables, leaf) for leaf in names.leaves(config)}
  dtype = dtype_name(dtype or arrays['params', 'embed'].dtype)
  target = Format(dtype, quantize)
  write(
    path,
    config,
    _reader(arrays),
    target,
    extra=extra,
    source=source,
    replace=source is None,
  )


def tensors(
  config: TransformerConfig, variables: Mapping[str, Any]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a file in memory, in float32.

  Variables may also be gradients or the moments of an optimizer.
  """
  config, variables = merged(config, variables)
  arrays = {leaf.path: _array(variables, leaf) for leaf in names.leaves(config)}
  target = Format('float32')
  read = _reader(arrays)
  return {
    one.name: np.concatenate([rows for _, rows in _rows(one, read)])
    for one in stored(config, target)
  }


def _reader(arrays: Mapping[tuple, Any]) -> Read:
  """Returns a reader of regions of arrays.

  From a device it fetches only single layers and experts.
  """
  # Traced indices: one small program per array, not one per layer.
  pick = jax.jit(lambda array, at: array[tuple(at)])
  host = {
    path: np.asarray(array)
    for path, array in arrays.items()
    if not isinstance(array, jax.Array) or _on_host(array)
  }

  def read(leaf: Leaf, region: tuple[slice, ...]) -> np.ndarray:
    if leaf.path in host:
      return host[leaf.path][region]
    at = [s.start for s in region[: leaf.lead]]
    one = np.asarray(pick(arrays[leaf.path], at))[region[leaf.lead :]]
    return one.reshape((1,) * leaf.lead + one.shape)

  return read


def _on_host(array: jax.Array) -> bool:
  """Returns whether an array lies on one CPU device."""
  devices = array.devices()
  return len(devices) == 1 and next(iter(devices)).platform == 'cpu'


def _array(variables: Mapping[str, Any], leaf: Leaf) -> Any:
  """Returns the array of a leaf; InputError where it does not fit config."""
  found = variables
  for key in leaf.path:
    try:
      found = found[key]
    except (KeyError, IndexError, TypeError):
      raise InputError(f'variables: {leaf.name} is missing') from None
  if isinstance(found, jax.Array) and not found.is_fully_addressable:
    raise InputError(
      f'variables: {leaf.name} is spread over processes; save a checkpoint and'
      ' convert it with experiments.convert'
    )
  if tuple(found.shape) != leaf.shape:
    raise InputError(
      f'variables: {leaf.name} is {list(found.shape)}; config makes it'
      f' {list(leaf.shape)}'
    )
  return found


def write(
  path: str,
  config: TransformerConfig,
  read: Read,
  target: Format,
  *,
  extra: Mapping[str, Any] | None = None,
  source: Any = None,
  replace: bool = False,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
  """Writes a folder from any source of regions.

  Args:
    path, config, extra: as for `save`.
    read: (leaf, region) -> array.
    target: how.
    source: JSON values that identify the numbers, as `identity` makes them; a
      killed run of the same source, format and configuration is resumed.
    replace: write files anew that are already there, whatever wrote them.
    progress: called with the bytes written so far and in all.

  Raises:
    InputError: the folder holds other work, or another process writes there.
  """
  fields = config_render.render(config, extra) | _header_fields(target)
  path = os.path.expanduser(path)
  os.makedirs(path, exist_ok=True)
  work = {
    # Numbers of unknown origin equal those of no other run.
    'source': source or secrets.token_hex(16),
    'format': target._asdict(),
    'config': fields,
  }
  with record.alone(path):
    kept = record.Record(path, work, replace=replace)
    shards = _shards(stored(config, target), target.shard_bytes)
    total = _write_shards(path, shards, read, kept, progress)
    _write_index(path, shards, total)
    record.write_json(os.path.join(path, 'config.json'), fields)
    kept.close()


def _write_shards(
  path: str,
  shards: Sequence[list[Stored]],
  read: Read,
  kept: record.Record,
  progress: Callable[[int, int], None],
) -> int:
  """Writes the shards that are not done; returns the bytes of all tensors."""
  total = sum(s.nbytes for shard in shards for s in shard)
  done = 0
  for i, shard in enumerate(shards):
    name = _file_name(i, len(shards))
    if not kept.finished(name):
      file = os.path.join(path, name)
      _write_shard(
        file, shard, read, lambda n, at=done: progress(at + n, total)
      )
      kept.done(name)
    done += sum(s.nbytes for s in shard)
    progress(done, total)
  return total


def _header_fields(target: Format) -> dict:
  """Returns the fields of config.json on dtype and quantisation."""
  dtypes = ('float32', 'bfloat16', 'float16')
  if target.dtype not in dtypes:
    raise InputError(f'dtype = {target.dtype!r}: must be one of {dtypes}')
  if target.quantize not in (None, 'fp8', 'fp8_ue8m0'):
    raise InputError(
      f'quantize = {target.quantize!r}: must be fp8, fp8_ue8m0 or None'
    )
  out = {'torch_dtype': target.dtype}
  if target.quantize:
    out['quantization_config'] = {
      'quant_method': 'fp8',
      'fmt': 'e4m3',
      'activation_scheme': 'dynamic',
      'weight_block_size': list(fp8.BLOCK),
    }
    if target.quantize == 'fp8_ue8m0':
      out['quantization_config']['scale_fmt'] = 'ue8m0'
  return out


def stored(config: TransformerConfig, target: Format) -> list[Stored]:
  """Returns every tensor of the folder, layer by layer."""
  dtype = safetensors_io.DTYPES[
    {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[target.dtype]
  ]
  family, out = families.of(config), []
  for leaf in names.leaves(config, family):
    one = _dtype(family, leaf, dtype)
    for part in names.parts(leaf):
      matrix = part.row.inputs > 0 and part.row.fp8
      how = target.quantize if matrix else None
      out.append(Stored(part.name, part, one, how))
  out += _copies(config, family, out)
  return sorted(out, key=lambda s: names.order(s.name))


def _dtype(family: Family, leaf: Leaf, dtype: np.dtype) -> np.dtype:
  """Returns the dtype of a stored tensor; biases stay float32, often more."""
  if leaf.integer:
    return np.dtype(np.int64)
  if (leaf.full_precision and family.exact) or leaf.path[0] == 'buffers':
    return np.dtype(np.float32)
  return dtype


def _copies(
  config: TransformerConfig, family: Family, listed: list[Stored]
) -> list[Stored]:
  """Returns the embedding and head that every MTP layer repeats."""
  name = family.names.root_name
  by_name = {s.name: s for s in listed}
  if config.tied:
    by_name[name('head')] = by_name[name('embed')]
  return [
    by_name[original]._replace(
      name=family.names.mtp_prefix(config.layers, depth) + copy
    )
    for depth in range(config.mtp.depth)
    for copy, original in family.names.mtp_copies.items()
  ]


def _shards(listed: list[Stored], limit: int) -> list[list[Stored]]:
  """Splits tensors, in order, into files of at most `limit` bytes."""
  shards, size = [[]], 0
  for one in listed:
    if shards[-1] and size + one.nbytes > limit:
      shards.append([])
      size = 0
    shards[-1].append(one)
    size += one.nbytes
  return shards


def _file_name(i: int, count: int) -> str:
  """Returns the name of file `i` of `count`."""
  if count == 1:
    return safetensors_io.SINGLE
  return f'model-{i + 1:05d}-of-{count:05d}.safetensors'


def _header_of(shard: list[Stored]) -> dict:
  """Returns the header entries of all tensors of a shard."""
  return {k: v for one in shard for k, v in one.tensors().items()}


def _write_shard(
  file: str,
  shard: Sequence[Stored],
  read: Read,
  progress: Callable[[int], None],
) -> None:
  """Writes one file, some rows of a tensor at a time."""
  done = 0
  with safetensors_io.Writer(file, _header_of(shard)) as writer:
    for one in shard:
      for start, block in _rows(one, read):
        if one.quantize:
          weight, scale = block
          writer.write(one.name, weight, start)
          writer.write(one.name + _SCALE, scale, start // fp8.BLOCK[0])
        else:
          writer.write(one.name, block, start)
      done += one.nbytes
      progress(done)


def _rows(one: Stored, read: Read) -> Iterator[tuple[int, Any]]:
  """Yields (first row, block) of a tensor in the file's layout.

  A quantised block is a pair, weight and scale.
  """
  part, leaf = one.part, one.part.leaf
  shape, inner, m = leaf.theirs, leaf.inner, leaf.row_multiple
  k = part.row.inputs
  columns = int(np.prod(shape[1:]))
  if one.quantize:
    step = fp8.rows_per_step(m, columns, STEP)
  else:
    step = m * max(1, STEP // max(m * columns, 1))
  for start in range(0, shape[0], step):
    stop = min(start + step, shape[0])
    region = [slice(0, n) for n in inner]
    # m rows of the file are one entry of our first output axis.
    region[k] = slice(start // m, stop // m)
    if part.half is not None:
      region.insert(k, slice(part.half, part.half + 1))
    region = (*(slice(i, i + 1) for i in part.at), *region)
    block = read(leaf, region)
    block = block.reshape(block.shape[leaf.lead :])
    if part.half is not None:
      block = block.squeeze(k)
    rows = names.to_theirs(leaf, block)
    if one.quantize:
      ue8m0 = one.quantize == 'fp8_ue8m0'
      yield start, fp8.quantize(rows, ue8m0=ue8m0, name=one.name)
    else:
      yield start, rows.astype(one.dtype)


def _write_index(path: str, shards: Sequence[list[Stored]], total: int) -> None:
  """Writes the index of several files; removes an old one for a single."""
  if len(shards) == 1:
    # A folder with an index is read by it: one of an older save must go.
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(path, safetensors_io.INDEX))
    return
  where = {
    name: _file_name(i, len(shards))
    for i, shard in enumerate(shards)
    for name in _header_of(shard)
  }
  index = {'metadata': {'total_size': total}, 'weight_map': where}
  record.write_json(os.path.join(path, safetensors_io.INDEX), index)
