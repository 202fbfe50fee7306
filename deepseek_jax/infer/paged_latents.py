"""Lets decoding read latents in the pages that the engine keeps them in.

The kernel of decoding takes a table of pages, and that of sparse attention the
places of the latents that a query chose, so none is gathered; where they don't
run, what XLA computes of gathered rows costs less.
Legend: R rows, n pages of a row.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.infer.pages import SCRATCH
from deepseek_jax.model.attention.latent_reading import FP8Latent, Latent
from deepseek_jax.model.attention.paged_latent import PagedLatent
from deepseek_jax.model.attention.sparse_latent import (
  PagedSparseLatent,
  SparseLatent,
)
from deepseek_jax.model.transformer_config import ComputeConfig
from deepseek_jax.parallel import sharding
from pallas_kernels import dispatch, mla_decode, sparse_mla

# What a layer caches, by the operation that reads its latents in pages.
Kinds = tuple[type, ...]
_OPS = {
  Latent: 'mla_decode',
  FP8Latent: 'mla_decode',
  SparseLatent: 'sparse_mla',
}
_PAGED = PagedLatent, PagedSparseLatent


def _own(node: Any) -> tuple:
  """Returns the leaves of a layer's cache that stay in pages."""
  return tuple(node.latents if type(node) is SparseLatent else node)


def _nodes(structure: Any, count: int, kinds: Kinds) -> list[Any]:
  """Returns the caches of `kinds`, of leaf numbers.

  Args: as of `leaves`.
  """
  held = jax.tree.unflatten(structure, range(count))
  which = lambda node: type(node) in kinds
  return list(filter(which, jax.tree.leaves(held, is_leaf=which)))


def leaves(structure: Any, count: int, kinds: Kinds) -> frozenset[int]:
  """Returns which leaves are latents that stay in pages.

  Args:
    structure: of all leaves that an engine holds.
    count: how many they are.
    kinds: of the caches.
  """
  nodes = _nodes(structure, count, kinds)
  return frozenset(i for node in nodes for i in _own(node))


def in_pages(layers: Any, table: jax.Array, kinds: Kinds) -> Any:
  """Returns the layers' caches with the latents of `kinds` in pages.

  Args:
    layers: those of the model and of multi-token prediction, in which these
      hold pages, each [repeat M P ...].
    table: [R n] int32, SCRATCH where there is none.
    kinds: of caches.
  """
  table = jnp.where(table == SCRATCH, -1, table)

  def one(node: Any) -> Any:
    if type(node) not in kinds:
      return node
    tables = jnp.broadcast_to(table, (node.c.shape[0], *table.shape))
    if type(node) is not SparseLatent:
      return PagedLatent(node, tables)
    latents = PagedLatent(node.latents, tables)
    return PagedSparseLatent(latents, node.index, node.means)

  return jax.tree.map(one, layers, is_leaf=lambda node: type(node) in kinds)


def plain(held: Any) -> tuple[Any, Kinds]:
  """Returns what is held without tables, and which kinds of caches had any."""
  kinds = set()

  def one(node: Any) -> Any:
    if type(node) is PagedLatent:
      node = node.pages
    elif type(node) is PagedSparseLatent:
      c, kr, *scales = node.latents.pages
      node = SparseLatent(c, kr, node.index, node.means, *scales)
    else:
      return node
    kinds.add(type(node))
    return node

  held = jax.tree.map(one, held, is_leaf=lambda node: type(node) in _PAGED)
  return held, tuple(kinds)


def wanted(compute: ComputeConfig, store: Any, paging: Any) -> Kinds:
  """Returns caches of which decoding reads latents in pages.

  Says once why not those of the others.

  Args:
    compute: of the model.
    store: what is cached; paging: how.
  """
  impl = compute.kernels
  if impl in (None, 'cudnn'):
    impl = dispatch.native()
  if not impl:
    return ()
  paged = [i for i, leaf in enumerate(paging.leaves) if leaf.ratio]
  pools = dict(zip(paged, store.pages))
  found = []
  for kind, op in _OPS.items():
    nodes = _nodes(paging.structure, len(paging.leaves), (kind,))
    if not nodes:
      continue
    # Layers of a kind are as the first one.
    own = [pools[i] for i in _own(nodes[0])]
    reason = _refused(kind, impl, compute.products, own)
    if reason:
      text = f'each call of decoding gathers its pages: {reason}'
      dispatch.say_once(logging.WARNING, op, text)
    else:
      found.append(kind)
  return tuple(found)


def _refused(
  kind: type, impl: str, queries: jax.typing.DTypeLike, own: list[jax.Array]
) -> str:
  """Returns why latents of a kind of cache are not read in pages, or ''.

  Args:
    kind: of the cache.
    impl: 'reference', 'gpu' or 'tpu'.
    queries: their dtype.
    own: a layer's pages: latents, rotary keys and, in float8, scales.
  """
  if sharding.to_shard():
    return 'a mesh of several devices'
  if impl == 'reference':
    return ''
  sparse = ''
  if kind is SparseLatent:
    # Chosen latents in float8 are dequantised on their way to the kernel.
    like = lambda a: jax.ShapeDtypeStruct(a.shape, queries)
    wide = map(like, own[:2]) if len(own) == 3 else own
    sparse = sparse_mla.refused(impl, queries, *wide)
  # Rows of few keys are read whole, in sparse attention, too.
  return sparse or mla_decode.refused(impl, queries, *own)
