"""Loads a Hugging Face folder as configuration and variables."""

import dataclasses
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from deepseek_jax import trees
from deepseek_jax.config import dtype_name
from deepseek_jax.errors import InputError
from deepseek_jax.hf.names import Leaf
from deepseek_jax.hf.source import Read, Source, summary
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel import sharding
from deepseek_jax.parallel.sharding import Rules

CHUNK = 1 << 26  # bytes handled at once


def load(
  path: str,
  *,
  dtype: str = 'float32',
  mtp: bool = False,
  mesh: Mesh | None = None,
  rules: Rules | None = None,
) -> tuple[TransformerConfig, dict]:
  """Loads a checkpoint of any family (docs/checkpoints.md has a table).

  Args:
    path: folder with config.json and safetensors.
    dtype: of the weights and the computation, 'float32' or 'bfloat16'; norms,
      routers and biases stay float32.
    mtp: keep the multi-token prediction layers.
    mesh, rules: where the arrays go; each process reads only what it holds.

  Returns:
    The configuration, and {'params': ..., 'buffers': ...}.

  Raises:
    InputError: a field, tensor or file that is wrong or not understood.
  """
  dtype = dtype_name(dtype)
  if dtype not in ('float32', 'bfloat16'):
    raise InputError(f"dtype = {dtype!r}: must be 'float32' or 'bfloat16'")
  source = Source(path, mtp=mtp)
  # Leaving out MTP is a note; a drafter, which cannot be read, a warning.
  note = logging.warning if source.drafter else logging.info
  for line in summary(source.unused):
    note('%s: %s', path, line)
  compute = dataclasses.replace(source.config.compute, dtype=dtype)
  config = dataclasses.replace(source.config, compute=compute)
  return config, variables(source.leaves, source.read, dtype, mesh, rules)


def variables(
  leaves: list[Leaf],
  read: Read,
  dtype: str | None,
  mesh: Mesh | None = None,
  rules: Rules | None = None,
) -> dict:
  """Returns the arrays of `leaves` as nested dicts.

  Args:
    leaves: to read.
    read: (leaf, region) -> array.
    dtype: of the arrays; full-precision leaves stay float32, tables int32;
      None keeps what is read.
    mesh, rules: where the arrays go; without a mesh, on the default device.
  """
  out: dict = {'params': {}, 'buffers': {}}
  for leaf in leaves:
    wanted = jnp.float32 if leaf.full_precision else dtype
    wanted = jnp.int32 if leaf.integer else wanted
    array = _array(leaf, read, wanted, mesh, rules)
    trees.put(out, leaf.path, array)
  return out


def _array(
  leaf: Leaf,
  read: Read,
  dtype: jax.typing.DTypeLike | None,
  mesh: Mesh | None,
  rules: Rules | None,
) -> jax.Array:
  """Returns a leaf as an array, sharded where there is a mesh."""
  if mesh is None:
    region = tuple(slice(0, n) for n in leaf.shape)
    return jnp.asarray(filled(leaf, read, region, dtype))
  place = jax.sharding.NamedSharding(
    mesh, sharding.spec(leaf.axes, rules or {}, len(leaf.shape))
  )

  def held(index: tuple[slice, ...]) -> np.ndarray:
    region = [slice(*i.indices(n)[:2]) for i, n in zip(index, leaf.shape)]
    return filled(leaf, read, tuple(region), dtype)

  return jax.make_array_from_callback(leaf.shape, place, held)


def filled(
  leaf: Leaf,
  read: Read,
  region: tuple[slice, ...],
  dtype: jax.typing.DTypeLike | None,
) -> np.ndarray:
  """Returns a region of a leaf in `dtype`, read about CHUNK bytes at a time."""
  out = None
  for piece in pieces(leaf, region):
    block = read(leaf, piece)
    if out is None:
      shape = [s.stop - s.start for s in region]
      out = np.empty(shape, dtype or block.dtype)
    at = [
      slice(p.start - s.start, p.stop - s.start) for p, s in _zip(piece, region)
    ]
    out[tuple(at)] = block
  return out


def _zip(a: Iterable, b: Iterable) -> zip:
  """Returns a strict zip."""
  return zip(a, b, strict=True)


def pieces(
  leaf: Leaf, region: tuple[slice, ...], limit: int = CHUNK
) -> Iterator[tuple[slice, ...]]:
  """Yields pieces of a region: rows of one tensor, at most `limit` bytes."""
  starts = [
    range(s.start, s.stop, n) for s, n in _zip(region, steps(leaf, limit))
  ]
  sizes = steps(leaf, limit)
  for corner in np.ndindex(*map(len, starts)):
    begin = [r[i] for r, i in zip(starts, corner)]
    yield tuple(
      slice(b, min(b + n, s.stop)) for b, n, s in zip(begin, sizes, region)
    )


def steps(leaf: Leaf, limit: int) -> list[int]:
  """Returns the size of a piece along every axis of a leaf."""
  sizes = [1] * leaf.lead + list(leaf.shape[leaf.lead :])
  row = leaf.rows[0]
  axis = leaf.lead + row.inputs + (row.half is not None)
  if axis < len(sizes):
    rest = math.prod(sizes) // max(sizes[axis], 1) * 4
    sizes[axis] = max(1, min(sizes[axis], limit // max(rest, 1)))
  return sizes
