"""Counts what an attention costs: multiply-adds per query, key and pair.

Each kind counts itself, in each form that it can be computed in. A new
attention either is registered here or has a method `cost(dim)` of its own.
Legend: D model, H heads, G key heads, K head dim, Q query latent, C latent, N
no-rope dim, R rope dim, V value dim.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig


@dataclasses.dataclass(frozen=True)
class Term:
  """Counts multiply-adds per (query, key) pair that a query really computes.

  Attributes:
    macs: per pair.
    scores: how many of these make scores, which the backward pass repeats.
    stride: one key stands for so many tokens (compressed attention).
    most: keys that a query takes at most (sparse or windowed); None: all.
    index: scores by which an indexer chooses; they have no gradient. (What
      an indexer learns from its own loss, over the chosen keys, is left out.)
  """

  macs: int
  scores: int = 0
  stride: int = 1
  most: int | None = None
  index: bool = False

  def keys(self, tokens: int) -> int:
    """Returns the keys of a query that attends to `tokens` tokens."""
    keys = tokens // self.stride
    return keys if self.most is None else min(keys, self.most)

  def triangle(self, length: int) -> int:
    """Returns the pairs of a sequence whose query t attends to tokens 1..t."""
    keys, over = length // self.stride, 0
    if self.most is not None and keys > self.most:
      over, keys = length - self.most * self.stride + 1, self.most - 1
      # Queries with fewer than `most` keys, then `over` that have just those.
      return self._ramp(keys, self.most * self.stride - 1) + over * self.most
    return self._ramp(keys, length)

  def _ramp(self, keys: int, length: int) -> int:
    """Returns the sum of t // stride for t = 1..length, `keys` the last."""
    last = length - keys * self.stride + 1  # how often `keys` occurs
    return self.stride * (keys * (keys - 1) // 2) + last * keys


@dataclasses.dataclass(frozen=True)
class Form:
  """Counts one way to compute an attention, in multiply-adds.

  Attributes:
    query: per new token: projections of queries, its own keys, the output.
    key: per cached token, whatever the number of queries.
    pairs: per (query, key) pair.
  """

  query: int
  key: int
  pairs: tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class AttentionCost:
  """Holds the cost of an attention in all its forms.

  Attributes:
    weights: matmul weights, each used once per token.
    fresh: tokens attend to themselves (training and prefill).
    cached: by name, the forms in which new tokens read a cache.
  """

  weights: int
  fresh: Form
  cached: Mapping[str, Form]


def attention_cost(attention: Any, dim: int) -> AttentionCost:
  """Returns the cost of an attention configuration at model width `dim`.

  A user's own class says it by a method `cost`, or is taken for the class of
  the library that it extends.

  Raises:
    InputError: the attention is neither.
  """
  if hasattr(attention, 'cost'):
    return attention.cost(dim)
  return _library_cost(attention, dim)


@functools.singledispatch
def _library_cost(attention, dim: int) -> AttentionCost:
  raise InputError(
    f'attention = {type(attention).__name__}: the planner does not know its'
    ' cost; give it a method cost(dim) -> plan.AttentionCost'
  )


@_library_cost.register
def _mla(attention: MLAConfig, dim: int) -> AttentionCost:
  """Returns the cost of latent attention (V2, section 2.1)."""
  a, D, H = attention, dim, attention.heads
  C, N, R, V = a.kv_rank, a.nope_dim, a.rope_dim, a.v_dim
  if a.q_rank is None:
    query = D * H * (N + R)
  else:
    query = a.q_rank * (D + H * (N + R))
  # Per new token: query, latent with rotary key, output projection.
  own = query + D * (C + R) + H * V * D
  # From the latent: every head's key and value.
  up = C * H * (N + V)
  # A pair in expanded form: N + R products of scores, V of values.
  wide = (Term(H * (N + R + V), H * (N + R)),)
  # Absorbed, keys and values are the latent itself, shared by all heads.
  narrow = (Term(H * (2 * C + R), H * (C + R)),)
  return AttentionCost(
    weights=own + up,
    fresh=Form(own + up, 0, wide),
    # Absorbing moves the up-projection from every key to every query.
    cached={
      'absorbed': Form(own + up, 0, narrow),
      'expanded': Form(own, up, wide),
    },
  )


@_library_cost.register
def _gqa(attention: GQAConfig, dim: int) -> AttentionCost:
  """Returns the cost of grouped-query attention."""
  a, D = attention, dim
  weights = 2 * D * a.head_dim * (a.heads + a.kv_heads)
  pairs = (Term(2 * a.heads * a.head_dim, a.heads * a.head_dim),)
  form = Form(weights, 0, pairs)
  return AttentionCost(weights, form, {'cached': form})


@_library_cost.register
def _dsa(attention: DSAConfig, dim: int) -> AttentionCost:
  """Returns the cost of latent attention with an indexer (V3.2)."""
  a, C, R = attention, attention.kv_rank, attention.rope_dim
  J, I = a.indexer.heads, a.indexer.dim
  dense = _mla(a, dim)
  weights = dense.weights + (a.q_rank or dim) * J * I + dim * (I + J)
  # The indexer scores every token; the core attends to the best top_k.
  flat = Term(J * I, index=True)
  index = (flat,)
  if blocks := a.indexer.blocks:
    # It scores the means of blocks, and then the tokens of some.
    some = dataclasses.replace(flat, most=blocks.size * blocks.count)
    index = dataclasses.replace(flat, stride=blocks.size), some
  chosen = Term(a.heads * (2 * C + R), a.heads * (C + R), most=a.top_k)
  form = Form(weights, 0, (chosen, *index))
  # Warm-up (V3.2): the core attends to all, the indexer scores as well.
  if a.stage == 'dense':
    return AttentionCost(
      weights, Form(weights, 0, (*dense.fresh.pairs, flat)), {'absorbed': form}
    )
  return AttentionCost(weights, form, {'absorbed': form})


@_library_cost.register
def _nsa(attention: NSAConfig, dim: int) -> AttentionCost:
  """Returns the cost of native sparse attention: three branches."""
  a, D, H, G = attention, dim, attention.heads, attention.kv_heads
  K, V, F = a.qk_dim, a.v_dim, a.hidden
  # Per token: queries, three gates and output; keys and values per branch.
  every = D * (H * (K + 3 + V) + 3 * G * (K + V))
  blocks = (a.block + 1) * F * (K + V)  # of the two compressing MLPs
  pair = functools.partial(Term, H * (K + V), H * K)
  # The branches in order: compressed, selected, window.
  pairs = (
    pair(stride=a.stride),
    pair(most=a.select * a.select_block),
    pair(most=a.window),
  )
  # Each of G keys and values is compressed once in `stride` tokens.
  form = Form(every + G * blocks // a.stride, 0, pairs)
  return AttentionCost(every + blocks, form, {'cached': form})


@_library_cost.register
def _shared_kv(attention: SharedKVConfig, dim: int) -> AttentionCost:
  """Returns the cost of V4's attention: a window and compressed entries."""
  a, D, C, Q = attention, dim, attention.head_dim, attention.q_rank
  wide = a.heads * C
  # Query through its latent; one key, which is the value too, for all heads.
  weights = D * Q + Q * wide + D * C
  # Each group of heads goes down to o_rank, all groups together up to D.
  weights += wide * a.o_rank + a.groups * a.o_rank * D
  pairs = [Term(2 * wide, wide, most=a.window)]
  if a.compress == 'hca':
    # Projection and gate of the compressor.
    weights += 2 * D * C
    pairs.append(Term(2 * wide, wide, stride=a.hca.ratio))
  if a.compress == 'csa':
    J, I, m = a.csa.index_heads, a.csa.index_dim, a.csa.ratio
    # Two series of entries and of index keys, each with gates; the indexer.
    weights += 2 * D * 2 * (C + I) + Q * J * I + D * J
    most = None if a.csa.stage == 'dense' else a.csa.top_k
    pairs.append(Term(2 * wide, wide, stride=m, most=most))
    pairs.append(Term(J * I, stride=m, index=True))
  form = Form(weights, 0, tuple(pairs))
  return AttentionCost(weights, form, {'cached': form})


def cache_elements(attention: Any, length: int) -> int:
  """Returns how many numbers a layer caches of `length` tokens.

  The attention's own abstract cache is counted.
  """
  made = jax.eval_shape(lambda: attention.cache(1, length, jnp.float32))
  return sum(math.prod(a.shape) for a in jax.tree.leaves(made))


def cache_bytes_fp8(attention: Any, length: int) -> int | None:
  """Returns the bytes of one layer's 8-bit records; None where none exist.

  In latent attention (FlashMLA) a record is the latent as e4m3, a float32 scale
  per 128 of it, and the rotary key as bfloat16; an index key is e4m3 with one
  scale, the mean of a block of them bfloat16. In V4 it is a vector with its
  rotated channels as bfloat16, the others as e4m3 with a byte of scale per 64,
  in multiples of 8; an index key has 4 bits a number and a byte of scale per
  32.
  """
  if isinstance(attention, SharedKVConfig):
    return _shared_bytes(attention, length)
  if not isinstance(attention, MLAConfig):
    return None
  C, R = attention.kv_rank, attention.rope_dim
  record = C + 4 * -(-C // 128) + 2 * R
  if isinstance(attention, DSAConfig):
    key = attention.indexer.dim + 4
    blocks = attention.indexer.blocks
    means = length // blocks.size if blocks else 0
    return length * (record + key) + means * 2 * attention.indexer.dim
  return length * record


def _shared_bytes(a: SharedKVConfig, length: int) -> int:
  """Returns the bytes of V4's records: the window, and entries by ratio."""
  flat = a.head_dim - a.rope_dim
  record = flat + 2 * a.rope_dim + 8 * -(-flat // (64 * 8))
  window = min(length, a.window) * record
  if a.compress == 'none':
    return window
  if a.compress == 'hca':
    return window + length // a.hca.ratio * record
  key = a.csa.index_dim // 2 + -(-a.csa.index_dim // 32)
  return window + length // a.csa.ratio * (record + key)
