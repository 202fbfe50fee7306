"""Lets decoding read latents in the pages that the engine keeps them in.

The kernel of decoding takes a table of pages, so nothing is gathered; where it
doesn't run, what XLA computes of gathered rows costs less.
Legend: R rows, n pages of a row.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.infer.pages import SCRATCH
from deepseek_jax.model.attention.latent_reading import FP8Latent, Latent
from deepseek_jax.model.attention.paged_latent import PagedLatent
from deepseek_jax.model.transformer_config import ComputeConfig
from deepseek_jax.parallel import sharding
from pallas_kernels import dispatch, mla_decode

_is_latent = lambda node: type(node) in (Latent, FP8Latent)
_is_paged = lambda node: type(node) is PagedLatent


def leaves(structure: Any, count: int) -> frozenset[int]:
  """Returns which leaves are latents of the model's own layers.

  Args:
    structure: of all leaves that an engine holds.
    count: how many they are.
  """
  layers = jax.tree.unflatten(structure, range(count))[0]
  nodes = jax.tree.leaves(layers, is_leaf=_is_latent)
  return frozenset(i for node in nodes if _is_latent(node) for i in node)


def in_pages(layers: Any, table: jax.Array) -> Any:
  """Returns the layers' caches with all latents in pages.

  Args:
    layers: in which latents hold pages, each [repeat M P ...].
    table: [R n] int32, SCRATCH where there is none.
  """
  table = jnp.where(table == SCRATCH, -1, table)

  def one(node: Any) -> Any:
    if not _is_latent(node):
      return node
    tables = jnp.broadcast_to(table, (node.c.shape[0], *table.shape))
    return PagedLatent(node, tables)

  return jax.tree.map(one, layers, is_leaf=_is_latent)


def plain(layers: Any) -> tuple[Any, bool]:
  """Returns the layers without tables, and whether there were any."""
  nodes = jax.tree.leaves(layers, is_leaf=_is_paged)
  one = lambda node: node.pages if _is_paged(node) else node
  layers = jax.tree.map(one, layers, is_leaf=_is_paged)
  return layers, any(map(_is_paged, nodes))


def wanted(compute: ComputeConfig, store: Any, paging: Any) -> bool:
  """Returns whether decoding reads latents in pages; says once why not.

  Args:
    compute: of the model.
    store: what is cached; paging: how.
  """
  impl = compute.kernels
  if impl in (None, 'cudnn'):
    impl = dispatch.native()
  if not paging.latents or not impl:
    return False
  if sharding.to_shard():
    reason = 'a mesh of several devices'
  elif impl == 'reference':
    return True
  else:
    pools = iter(store.pages)
    paged = [i for i, leaf in enumerate(paging.leaves) if leaf.ratio]
    own = [pool for i, pool in zip(paged, pools) if i in paging.latents]
    # The first layer's: latents, rotary keys and, in float8, scales.
    held = FP8Latent if compute.cache == 'float8' else Latent
    reason = mla_decode.refused(
      impl, compute.products, *own[: len(held._fields)]
    )
  if reason:
    text = f'each call of decoding gathers its pages: {reason}'
    dispatch.say_once(logging.WARNING, 'mla_decode', text)
  return not reason
