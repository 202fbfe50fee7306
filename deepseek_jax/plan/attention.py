"""What an attention costs: multiply-adds per query, per key and per pair.

Each kind answers for itself, in each form that it can be computed in. A new
attention either is registered here or has a method `cost(dim)` of its own.
Legend: D model, H heads, G key heads, K head dim, Q query latent, C latent,
N no-rope dim, R rope dim, V value dim.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deepseek_jax.errors import InputError
from deepseek_jax.layers.gqa import GQAConfig
from deepseek_jax.layers.mla import MLAConfig


@dataclasses.dataclass(frozen=True)
class Term:
  """Multiply-adds per (query, key) pair that a query really computes.

  Attributes:
    macs: per pair.
    scores: how many of these make scores, which the backward pass repeats.
    stride: one key stands for so many tokens (compressed attention).
    most: keys that a query takes at most (sparse or windowed); None: all.
  """

  macs: int
  scores: int = 0
  stride: int = 1
  most: int | None = None

  def keys(self, tokens: int) -> int:
    """Keys of a query that may look at `tokens` tokens."""
    keys = tokens // self.stride
    return keys if self.most is None else min(keys, self.most)

  def triangle(self, length: int) -> int:
    """Pairs of a whole sequence in which query t looks at t = 1..length."""
    keys, over = length // self.stride, 0
    if self.most is not None and keys > self.most:
      over, keys = length - self.most * self.stride + 1, self.most - 1
      # Queries with fewer than `most` keys, then `over` that have just those.
      return self._ramp(keys, self.most * self.stride - 1) + over * self.most
    return self._ramp(keys, length)

  def _ramp(self, keys: int, length: int) -> int:
    """Sum of t // stride for t = 1..length, the last of them `keys`."""
    last = length - keys * self.stride + 1  # how often `keys` occurs
    return self.stride * (keys * (keys - 1) // 2) + last * keys


@dataclasses.dataclass(frozen=True)
class Form:
  """One way to compute an attention; all numbers are multiply-adds.

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
  """All forms of an attention.

  Attributes:
    weights: matmul weights, each used once per token.
    fresh: tokens attend to themselves (training and prefill).
    cached: by name, the forms in which new tokens read a cache.
  """

  weights: int
  fresh: Form
  cached: Mapping[str, Form]


@functools.singledispatch
def attention_cost(attention, dim: int) -> AttentionCost:
  """The cost of an attention configuration on a model of width `dim`."""
  if hasattr(attention, 'cost'):
    return attention.cost(dim)
  raise InputError(
    f'attention = {type(attention).__name__}: the planner does not know its'
    ' cost; give it a method cost(dim) -> plan.AttentionCost'
  )


@attention_cost.register
def _mla(attention: MLAConfig, dim: int) -> AttentionCost:
  a, D, H = attention, dim, attention.heads
  C, N, R, V = a.kv_rank, a.nope_dim, a.rope_dim, a.v_dim
  if a.q_rank is None:
    query = D * H * (N + R)
  else:
    query = a.q_rank * (D + H * (N + R))
  own = query + D * (C + R) + H * V * D
  up = C * H * (N + V)
  wide = (Term(H * (N + R + V), H * (N + R)),)
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


@attention_cost.register
def _gqa(attention: GQAConfig, dim: int) -> AttentionCost:
  a, D = attention, dim
  weights = 2 * D * a.head_dim * (a.heads + a.kv_heads)
  pairs = (Term(2 * a.heads * a.head_dim, a.heads * a.head_dim),)
  form = Form(weights, 0, pairs)
  return AttentionCost(weights, form, {'cached': form})


def cache_elements(attention, length: int) -> int:
  """Numbers that one layer caches of `length` tokens; asks its own cache."""
  made = jax.eval_shape(lambda: attention.cache(1, length, jnp.float32))
  return sum(math.prod(a.shape) for a in jax.tree.leaves(made))


def cache_bytes_fp8(attention, length: int) -> int | None:
  """Bytes of FlashMLA's 8-bit records of one layer; None where none exist.

  A record is the latent as e4m3, a float32 scale per 128 of it, and the
  rotary key as bfloat16.
  """
  if not isinstance(attention, MLAConfig):
    return None
  C, R = attention.kv_rank, attention.rope_dim
  return length * (C + 4 * -(-C // 128) + 2 * R)
