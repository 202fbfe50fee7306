"""Keeps variables as an orbax checkpoint, written and read by regions.

orbax itself writes what describes the tree, for arrays of one number each; the
zarr arrays beside it are then replaced by ones of the true shape and filled
chunk by chunk. So a model of any size is converted in little memory, and
`orbax.checkpoint.StandardCheckpointer().restore` reads the result.

A folder holds `variables` (the checkpoint) and `model.json` (configuration,
dtype, source, carried fields of config.json). A chunk is one layer, one
expert, some rows; a chunk file that exists is complete, which makes filling
resumable. When all are, manifests with their hashes are written, and whoever
reads a chunk checks it (see `store_manifest`).
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Mesh

from deepseek_jax import files, trees
from deepseek_jax.config import from_dict, to_dict
from deepseek_jax.config_changes import with_defaults
from deepseek_jax.errors import InputError
from deepseek_jax.hf import identity, loading, names
from deepseek_jax.hf import store_manifest as manifest
from deepseek_jax.hf.chunks import (
  ALONE,
  Share,
  chunk_shape,
  owner,
  shard_counts,
)
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.source import Read
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel.sharding import Rules

MODEL = 'model.json'
VARIABLES = 'variables'
VERIFY = ('full', 'off')


def create(
  folder: str,
  config: TransformerConfig,
  dtype: str,
  *,
  share: Share = ALONE,
  notes: Mapping[str, Any] | None = None,
) -> None:
  """Makes an empty store, or checks that the one there is of the same work.

  Args:
    folder: where; made by whichever process comes first.
    config, dtype: of the variables; norms, routers and biases are float32.
    share: the mesh decides the chunks.
    notes: JSON values kept in model.json.
  """
  about = {
    'config': to_dict(config),
    'dtype': dtype,
    'mesh': dict(share.mesh),
    'notes': dict(notes or {}),
  }
  about = json.loads(json.dumps(about))
  if not os.path.exists(os.path.join(folder, MODEL)):
    _create(folder, config, dtype, share, about)
  there = files.load_json(os.path.join(folder, MODEL))
  there = with_defaults(there, {'config': config})
  other = identity.difference(there, about)
  if other:
    raise InputError(
      f'{folder}: was begun with another {other.removeprefix("notes.")}; remove'
      ' it, or convert to another folder'
    )


def _create(
  folder: str,
  config: TransformerConfig,
  dtype: str,
  share: Share,
  about: Mapping[str, Any],
) -> None:
  """Makes an empty store beside `folder` and renames it into place."""
  leaves = names.leaves(config)
  above = os.path.dirname(os.path.abspath(folder))
  os.makedirs(above, exist_ok=True)
  temporary = tempfile.mkdtemp(dir=above, prefix='.convert-')
  _skeleton(os.path.join(temporary, VARIABLES), leaves)
  for leaf in leaves:
    _declare(os.path.join(temporary, VARIABLES), leaf, dtype, share)
  with open(os.path.join(temporary, MODEL), 'w', encoding='utf-8') as file:
    json.dump(about, file, indent=2)
  # Renamed whole: no other process sees half a store.
  os.chmod(temporary, 0o755)
  try:
    os.rename(temporary, folder)
  except OSError:  # another process was first, or the folder holds other files
    shutil.rmtree(temporary)
    if not os.path.exists(os.path.join(folder, MODEL)):
      raise InputError(f'{folder}: is there and not empty') from None


def _skeleton(path: str, leaves: list[Leaf]) -> None:
  """Lets orbax write a tree of arrays of one number each."""
  import orbax.checkpoint as ocp

  one = lambda leaf: np.zeros((1,) * len(leaf.shape), np.float32)
  tree = trees.nested((leaf.path, one(leaf)) for leaf in leaves)
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(os.path.abspath(path), tree)


def _declare(path: str, leaf: Leaf, dtype: str, share: Share) -> None:
  """Replaces an array of one number by an empty one of the true shape."""
  folder = os.path.join(path, leaf.name)
  declared = os.path.join(folder, '.zarray')
  fields = files.load_json(declared)
  shutil.rmtree(folder)
  os.makedirs(folder)
  one = np.dtype('float32') if leaf.full_precision else None
  name = '<f4' if one or dtype == 'float32' else dtype
  name = '<i4' if leaf.integer else name
  itemsize = 4 if name in ('<f4', '<i4') else 2
  fields |= {
    'shape': list(leaf.shape),
    'chunks': chunk_shape(leaf, share, itemsize),
    'dtype': name,
    'compressor': None,  # weights hardly shrink
  }
  with open(declared, 'w', encoding='utf-8') as file:
    json.dump(fields, file)


class Store:
  """Opens a store.

  Attributes:
    folder: where it is.
    config, dtype, notes: as `create` got them.
    leaves: its arrays.
  """

  def __init__(self, folder: str, *, verify: str = 'full'):
    """Opens a store; the files that describe the arrays are checked here.

    Args:
      folder: as `create` made it.
      verify: 'full' compares every chunk that is read with its hash, 'off'
        only its size.

    Raises:
      InputError: it is damaged.
    """
    if verify not in VERIFY:
      raise InputError(f'verify = {verify!r}: must be one of {VERIFY}')
    self.folder = folder = os.path.expanduser(folder)
    self._verify, self._checked = verify, set()
    self._files = manifest.read(folder)
    for name, wanted in (self._files or {}).items():
      if not _is_chunk(name):
        manifest.check(folder, name, wanted, content=True)
    path = os.path.join(folder, MODEL)
    about = files.load_json(path)
    for key, kind in (('config', dict), ('dtype', str), ('notes', dict)):
      if not isinstance(about.get(key), kind):
        raise InputError(f'{path}: {key} is missing or damaged')
    try:
      self.config = from_dict(TransformerConfig, about['config'])
    except InputError as error:
      raise InputError(f'{path}: config: {error}') from None
    self.dtype, self.notes = about['dtype'], about['notes']
    self.leaves = names.leaves(self.config)
    self._arrays: dict = {}

  def source(self) -> dict[str, Any]:
    """Returns what identifies the numbers: the hashes of all files.

    Raises InputError if the store was not filled to the end.
    """
    if self._files is None:
      raise self._incomplete('the store')
    return {'store': self._files}

  def _incomplete(self, what: str) -> InputError:
    """Returns the error of a conversion that was not finished."""
    return InputError(
      f'{self.folder}: {what} is incomplete; run the conversion again to'
      ' finish it'
    )

  def _array(self, leaf: Leaf) -> ts.TensorStore:
    """Returns the tensorstore of a leaf, opened once."""
    if leaf.path not in self._arrays:
      path = os.path.join(self.folder, VARIABLES, leaf.name)
      spec = {
        'driver': 'zarr',
        'kvstore': {'driver': 'file', 'path': os.path.abspath(path)},
        # A chunk of zeros is stored too: its file says that it is done.
        'store_data_equal_to_fill_value': True,
      }
      self._arrays[leaf.path] = ts.open(spec, open=True).result()
    return self._arrays[leaf.path]

  def read(self, leaf: Leaf, region: tuple[slice, ...]) -> np.ndarray:
    """Returns a region of an array.

    Raises InputError if it was never filled, or is damaged.
    """
    for cell, _ in self._cells(leaf, region):
      self._check(leaf, cell)
    return self._array(leaf)[region].read().result()

  def _check(self, leaf: Leaf, cell: tuple[int, ...]) -> None:
    """Compares a chunk with its manifest, once for every opened store."""
    name = self._name(leaf, cell)
    if name in self._checked:
      return
    if self._files is None or not os.path.exists(self._chunk(leaf, cell)):
      raise self._incomplete(leaf.name)
    if name not in self._files:
      raise InputError(f'{self.folder}: {name} is in no manifest')
    content = self._verify == 'full'
    manifest.check(self.folder, name, self._files[name], content=content)
    self._checked.add(name)

  def _cells(
    self, leaf: Leaf, region: tuple[slice, ...]
  ) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Yields (chunk number, its region) of the chunks that a region meets."""
    size = self._array(leaf).chunk_layout.read_chunk.shape
    ranges = [
      range(s.start // n, -(-s.stop // n)) for s, n in zip(region, size)
    ]
    for corner in np.ndindex(*map(len, ranges)):
      cell = tuple(r[i] for r, i in zip(ranges, corner))
      yield (
        cell,
        tuple(
          slice(c * n, min((c + 1) * n, stop))
          for c, n, stop in zip(cell, size, leaf.shape)
        ),
      )

  def _name(self, leaf: Leaf, cell: tuple[int, ...]) -> str:
    """Returns a chunk's file name below the folder."""
    return '/'.join((VARIABLES, leaf.name, '.'.join(map(str, cell)) or '0'))

  def _chunk(self, leaf: Leaf, cell: tuple[int, ...]) -> str:
    """Returns the path of a chunk's file."""
    return os.path.join(self.folder, self._name(leaf, cell))

  def fill(
    self,
    read: Read,
    share: Share = ALONE,
    progress: Callable[[int, int], None] = lambda done, total: None,
  ) -> None:
    """Writes every chunk of this process that isn't there yet, then a manifest.

    Args:
      read: (leaf, region) -> array.
      share: which chunks are this process's.
      progress: called with the bytes done and in all, of this process.
    """
    work = [
      (leaf, cell, region)
      for leaf in self.leaves
      for cell, region in self._cells(leaf, _whole(leaf))
      if self._owner(leaf, region, share) == share.process
    ]
    sizes = [_nbytes(self._array(leaf), region) for leaf, _, region in work]
    done, total = 0, sum(sizes)
    for (leaf, cell, region), size in zip(work, sizes):
      if not os.path.exists(self._chunk(leaf, cell)):
        array = self._array(leaf)
        block = loading.filled(leaf, read, region, array.dtype.numpy_dtype)
        array[region].write(block).result()
      done += size
      progress(done, total)
    files = [MODEL, *_described(self.folder)]
    files += [self._name(leaf, cell) for leaf, cell, _ in work]
    manifest.write(self.folder, files, share.process, share.processes)
    self._files = manifest.read(self.folder)

  def _owner(self, leaf: Leaf, region: tuple[slice, ...], share: Share) -> int:
    """Returns the process that fills the chunk of a region."""
    counts = shard_counts(leaf, share)
    shard = [s.start // (n // c) for s, n, c in zip(region, leaf.shape, counts)]
    return owner(leaf, tuple(shard), share)


def _is_chunk(name: str) -> bool:
  """Returns whether a file name is that of a zarr chunk."""
  return name.rpartition('/')[2].replace('.', '').isdigit()


def _described(folder: str) -> list[str]:
  """Returns the files of the checkpoint that are no chunks, in order."""
  out = []
  for above, _, found in os.walk(os.path.join(folder, VARIABLES)):
    where = os.path.relpath(above, folder).replace(os.sep, '/')
    out += [f'{where}/{file}' for file in found if not _is_chunk(file)]
  # tensorstore's own, while another process writes a chunk.
  return sorted(name for name in out if not name.endswith('.__lock'))


def _whole(leaf: Leaf) -> tuple[slice, ...]:
  """Returns the region of a whole leaf."""
  return tuple(slice(0, n) for n in leaf.shape)


def _nbytes(array: ts.TensorStore, region: tuple[slice, ...]) -> int:
  """Returns the bytes of a region of a tensorstore."""
  size = math.prod(s.stop - s.start for s in region)
  return size * array.dtype.numpy_dtype.itemsize


def restore(
  folder: str,
  *,
  mesh: Mesh | None = None,
  rules: Rules | None = None,
  verify: str = 'full',
) -> tuple[TransformerConfig, dict]:
  """Loads a converted store: (config, {'params': ..., 'buffers': ...}).

  Args:
    folder: of the store.
    mesh, rules: where the arrays go; each process reads only what it holds.
    verify: 'full' hashes every chunk that is read, 'off' compares sizes.

  Raises:
    InputError: the conversion was not finished, or a file is damaged.
  """
  store = Store(folder, verify=verify)
  arrays = loading.variables(store.leaves, store.read, None, mesh, rules)
  return store.config, arrays


def abstract(folder: str) -> dict:
  """Returns ShapeDtypeStructs of a store, the target of orbax's restore."""
  store = Store(folder)
  dtype = lambda leaf: store._array(leaf).dtype.numpy_dtype
  one = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype(leaf))
  return trees.nested((leaf.path, one(leaf)) for leaf in store.leaves)
