"""Opens a Hugging Face folder as our arrays, any region read on demand.

Only the bytes of the rows that a region needs are read; float8 weights are
dequantised on the way. So a process that holds a shard reads a shard.
"""

import os
import re
from collections.abc import Callable, Mapping

import numpy as np

from deepseek_jax import files
from deepseek_jax.errors import InputError, told
from deepseek_jax.hf import (
  config_json,
  config_limits,
  fp8,
  mxfp4,
  names,
  record,
  safetensors_io,
)
from deepseek_jax.hf.names import Leaf

_SCALE = '_scale_inv'
_UNDECLARED = (
  'is multi-token prediction that num_nextn_predict_layers of config.json does'
  ' not declare'
)
_FLOATS = ('F64', 'F32', 'F16', 'BF16', 'F8_E4M3')
_PLAIN = frozenset(safetensors_io.DTYPES[n] for n in _FLOATS)
_INTEGERS = frozenset(safetensors_io.DTYPES[n] for n in ('I64', 'I32', 'I16'))

# (leaf, region of its shape) -> array; what saving and converting read from.
Read = Callable[[Leaf, tuple[slice, ...]], np.ndarray]


_HUB_NAME = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')


def absent(folder: str) -> str:
  """Returns what is wrong with a folder that is not there, and the fix."""
  if _HUB_NAME.fullmatch(folder) and not os.path.exists(folder):
    return (
      f'is no folder. Nothing is downloaded here: hf download {folder}'
      ' --local-dir=DIR, then give DIR'
    )
  return 'is no folder'


def summary(unused: Mapping[str, str]) -> list[str]:
  """Returns lines that name what of a folder is not used, each with why.

  Many tensors of one kind share a line.
  """
  by_reason: dict[str, list[str]] = {}
  for name, why in unused.items():
    by_reason.setdefault(why, []).append(name)
  out = []
  for why, found in by_reason.items():
    if len(found) <= 8:
      out += [f'{name} is not used: it {why}' for name in found]
    else:
      out.append(
        f'{found[0]} and {len(found) - 1} more are not used: each {why}'
      )
  return out


class Source:
  """Opens a folder and accounts for its every tensor.

  Attributes:
    family: whose names the folder has.
    config: the model.
    carried: fields of config.json that don't change the model.
    leaves: the arrays of its variables.
    quantized: whether any weight is float8.
    unused: names of tensors that are not read, and of fields of config.json
      that describe them, each with why.
    drafter: whether the folder has a speculative drafter, which is not read.
  """

  def __init__(self, folder: str, *, mtp: bool | None = False):
    """Checks all names and shapes; reads no weights.

    mtp: keep the multi-token prediction layers; None: if the file has them.
    Raises InputError for whatever is missing, damaged or not understood.
    """
    if not isinstance(folder, str | os.PathLike):
      raise InputError(f'path: is {told(folder)}; give a folder')
    self.folder = folder = os.path.expanduser(folder)
    if not os.path.isdir(folder):
      raise InputError(f'{folder}: {absent(folder)}')
    record.check(folder)
    parsed = config_json.parse(
      files.load_json(
        os.path.join(folder, 'config.json'), config_limits.FILE_BYTES
      )
    )
    self.family, self.carried = parsed.family, parsed.carried
    self._block = tuple(
      (parsed.quantization or {}).get('weight_block_size', ())
    )
    self.config = parsed.config
    self.entries = self.family.names.original(
      safetensors_io.read_folder(folder)
    )
    self._check_layers()
    self._depth = parsed.config.mtp.depth
    self.drafter = bool(parsed.drafter) or self._has_drafter()
    if not self._keep_mtp(mtp):
      self.config = config_json.without_mtp(parsed.config)
    self.leaves = names.leaves(self.config, self.family)
    self._own = {leaf.path: leaf for leaf in self.leaves}
    used = self._used()
    self.quantized = any(n + _SCALE in self.entries for n in used)
    used |= {n + _SCALE for n in used if n + _SCALE in self.entries}
    left = sorted(set(self.entries) - used)
    self.unused = {n: self._why_unused(n) for n in left}
    for field in parsed.drafter:
      self.unused[f'config.json: {field}'] = self._of_drafter()

  def _used(self) -> set[str]:
    """Checks every tensor of the model; the first that is missing ends it."""
    used = set()
    for leaf in self.leaves:
      for part in names.parts(leaf):
        self._check(part)
        used.add(part.name)
    return used

  def _check_layers(self) -> None:
    """Raises InputError unless the files have a tensor of every layer.

    This comes before anything is built whose size config.json alone decides.
    """
    there = set(map(self.family.names.layer_of, self.entries))
    for i in range(self.config.layers):
      if i not in there:
        raise InputError(
          f'{self.folder}: config.json: num_hidden_layers ='
          f' {self.config.layers}: the files have no tensor of layer {i}'
        )

  def _has_drafter(self) -> bool:
    """Returns whether the folder has tensors of a drafter."""
    drafter = self.family.drafter
    return drafter is not None and any(
      self._mtp_of(name) is not None and any(m in name for m in drafter.tensors)
      for name in self.entries
    )

  def _mtp_of(self, name: str) -> int | None:
    """Returns which depth of prediction a tensor's prefix names, or None."""
    return self.family.names.mtp_of(self.config.layers, name)

  def _of_drafter(self) -> str:
    """Returns why what belongs to a drafter is not used."""
    return f'is of a {self.family.drafter.name}, which is not read yet'

  def _keep_mtp(self, mtp: bool | None) -> bool:
    """Returns whether MTP is read; by default where the files have it."""
    if self.drafter:
      if mtp:
        raise InputError(
          f'mtp = True: {self.folder} has a {self.family.drafter.name} in'
          ' place of multi-token prediction; it is not read yet, use mtp ='
          ' False'
        )
      return False
    if mtp is None:
      first = self.family.names.mtp_prefix(self.config.layers, 0)
      return any(name.startswith(first) for name in self.entries)
    return mtp

  def _check(self, part: names.Part) -> None:
    """Raises InputError unless a tensor has the shape and dtype of its part."""
    entry = self.entries.get(part.name)
    if entry is None:
      raise InputError(
        f'{self.folder}: tensor {part.name!r} is missing; {part.leaf.name}'
        ' needs it'
      )
    if self._shape(part.name) != part.leaf.theirs:
      raise InputError(
        f'{self.folder}: tensor {part.name!r} is {list(entry.shape)}; config'
        f'.json makes it {list(part.leaf.theirs)} ({part.leaf.name})'
      )
    if part.leaf.integer:
      if entry.dtype not in _INTEGERS:
        raise InputError(
          f'{self.folder}: tensor {part.name!r} is {entry.dtype}: must be'
          ' integers'
        )
      return
    scale = self.entries.get(part.name + _SCALE)
    if scale is not None and entry.dtype == mxfp4.PACKED:
      self._check_scale(part.name, part.leaf.theirs, scale, mxfp4.BLOCK)
      return
    if entry.dtype not in _PLAIN:
      raise InputError(
        f'{self.folder}: tensor {part.name!r} is {entry.dtype}: not supported'
      )
    if (entry.dtype == fp8.E4M3) != (scale is not None):
      raise InputError(
        f'{self.folder}: tensor {part.name!r} is {entry.dtype} with'
        f' {"a" if scale else "no"} {_SCALE[1:]}; float8 needs one, and only it'
      )
    if scale is not None:
      if not self._block:
        raise InputError(
          f'config.json: quantization_config: missing; {part.name!r} is'
          ' quantised'
        )
      self._check_scale(part.name, entry.shape, scale, self._block)

  def _shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor as numbers: MXFP4 packs two in a byte."""
    entry = self.entries[name]
    packed = entry.dtype == mxfp4.PACKED and name + _SCALE in self.entries
    return mxfp4.unpacked_shape(entry.shape) if packed else entry.shape

  def _check_scale(
    self,
    name: str,
    shape: tuple[int, ...],
    scale: safetensors_io.Entry,
    block: tuple[int, ...],
  ) -> None:
    """Raises InputError unless the scales have one entry per block."""
    wanted = fp8.scale_shape(shape, block)
    if scale.shape != wanted:
      raise InputError(
        f'{self.folder}: tensor {name + _SCALE!r} is {list(scale.shape)};'
        f' blocks of {list(block)} make it {list(wanted)}'
      )

  def _why_unused(self, name: str) -> str:
    """Returns why a tensor is not read; InputError if nothing explains."""
    if any(name.endswith(d) for d in names.DERIVED):
      return 'follows from config.json'
    why = self._why_no_prediction(name)
    if why is not None:
      return why
    head, embed = map(self.family.names.root_name, ('head', 'embed'))
    if name == head and self.config.tied:
      self._check_copy(name, embed)
      return f'equals {embed}'
    entry = self.entries[name]
    if not entry.nbytes:
      return 'is empty'
    raise InputError(
      f'{self.folder}: tensor {name!r} {list(entry.shape)} belongs to nothing'
      ' that config.json names'
    )

  def _why_no_prediction(self, name: str) -> str | None:
    """Returns why a tensor of multi-token prediction is not read, or None.

    None also for what is of no prediction layer.
    """
    at = self._mtp_of(name)
    if at is None:
      return None
    if self.drafter:
      return self._of_drafter()
    tables = self.family.names
    prefix = tables.mtp_prefix(self.config.layers, at)
    if at >= self._depth:
      marked = all(prefix + m in self.entries for m in tables.mtp_marks)
      return _UNDECLARED if tables.mtp and marked else None
    if not self.config.mtp.depth:
      return 'multi-token prediction, not asked for'
    original = tables.mtp_copies.get(name.removeprefix(prefix))
    if original is None:
      return None
    self._check_copy(name, original)
    return f'equals {original}'

  def _check_copy(self, name: str, original: str) -> None:
    """Raises InputError unless a repeated tensor equals its original."""
    tables = self.family.names
    if original == tables.root_name('head') and self.config.tied:
      original = tables.root_name('embed')
    a, b = self.entries[name], self.entries[original]
    if a.shape != b.shape:
      raise InputError(f'{self.folder}: {name!r} differs from {original!r}')
    step = max(1, (1 << 26) * a.shape[0] // max(a.nbytes, 1))
    for start in range(0, a.shape[0], step):
      stop = min(start + step, a.shape[0])
      x, y = (safetensors_io.read(e, start, stop) for e in (a, b))
      if not np.array_equal(x.astype(np.float32), y.astype(np.float32)):
        raise InputError(
          f'{self.folder}: {name!r} differs from {original!r}; the model has'
          ' one matrix for both'
        )

  def read(self, leaf: Leaf, region: tuple[slice, ...]) -> np.ndarray:
    """Returns a region of one of our arrays, in the file's dtype or float32.

    Args:
      leaf: the array, by the names of any family.
      region: of its shape.
    """
    leaf = self._own[leaf.path]
    lead = [range(s.start, s.stop) for s in region[: leaf.lead]]
    inner = list(region[leaf.lead :])
    k, halves = leaf.rows[0].inputs, None
    if leaf.rows[0].half is not None:
      cut = inner.pop(k)
      halves = range(cut.start, cut.stop)
    out = None
    for part in names.parts(leaf, lead, halves):
      block = self._block_of(part, inner)
      if out is None:
        out = np.empty([s.stop - s.start for s in region], block.dtype)
      at = [i - r.start for i, r in zip(part.at, lead)]
      if part.half is not None:
        at += [slice(None)] * k + [part.half - halves.start]
      out[tuple(at)] = block
    return out

  def _block_of(self, part: names.Part, inner: list[slice]) -> np.ndarray:
    """Returns the inner region of one tensor in our axes."""
    leaf = part.leaf
    rows, columns = names.window(leaf, inner)
    block = self._window(part.name, rows, columns)
    if leaf.integer:
      self._check_experts(part.name, block)
    return names.from_theirs(leaf, block, tuple(inner))

  def _check_experts(self, name: str, table: np.ndarray) -> None:
    """Raises InputError for a number that is no expert.

    It would silently select another one.
    """
    experts = self.config.moe.experts
    wrong = (table < 0) | (table >= experts)
    if wrong.any():
      raise InputError(
        f'{self.folder}: tensor {name!r} holds {table[wrong][0]}: must be'
        f' numbers of experts, 0..{experts - 1}'
      )

  def _window(
    self, name: str, rows: slice, columns: slice | None
  ) -> np.ndarray:
    """Returns a part of a tensor of the file, dequantised if quantised."""
    entry, scale = (self.entries.get(n) for n in (name, name + _SCALE))
    packed = scale is not None and entry.dtype == mxfp4.PACKED
    if packed:
      found = mxfp4.read(entry, rows, columns)
    else:
      found = safetensors_io.read(entry, rows.start, rows.stop, columns)
    if scale is None:
      return found
    block = mxfp4.BLOCK if packed else self._block
    # The scales of the blocks that the region touches.
    r, c = (
      slice(s.start // b, -(-s.stop // b))
      for s, b in zip((rows, columns), block)
    )
    scales = safetensors_io.read(scale, r.start, r.stop, c)
    corner = (rows.start, columns.start)
    return fp8.dequantize(found, scales, block, corner)
