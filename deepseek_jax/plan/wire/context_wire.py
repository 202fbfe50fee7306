"""Counts what context parallelism sends, by kind of attention.

Bytes are sent in two ways: gathered, a device's sequence shard goes to all
others ((n-1)/n of the whole by a ring); near, a few tokens go to the device
behind. In training the gradients of both come back; numbers of documents and
positions have none.
Legend: T tokens of a device, S of all, m ratio, J series, C entry dim, W
window.
"""

import functools
from typing import Any, NamedTuple

from deepseek_jax.errors import InputError
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.plan.attention import cache_elements


class Moved(NamedTuple):
  """Counts bytes of one layer and one sequence.

  Attributes:
    gathered: arrays with gradients, whole; near: what neighbours send.
    fixed, fixed_near: the same of what has no gradient.
  """

  gathered: int
  near: int = 0
  fixed: int = 0
  fixed_near: int = 0

  def sent(self, ways: int, forward: int) -> tuple[int, int]:
    """Returns the bytes that a device sends in a step.

    Args:
      ways: devices of the context axis.
      forward: how often the layer runs forward; it runs backward once.

    Returns:
      (bytes of what has gradients, bytes of what has none).
    """
    ring = lambda size: size * (ways - 1) // ways
    return (
      (forward + 1) * (ring(self.gathered) + self.near),
      forward * (ring(self.fixed) + self.fixed_near),
    )


class Cut(NamedTuple):
  """Describes how sequences are sharded.

  Attributes:
    tokens: T; ways: devices that share a sequence.
    width: bytes of a number.
    documents: whether a window holds several.
    heads: ways that the heads are sharded.
  """

  tokens: int
  ways: int
  width: int
  documents: bool = False
  heads: int = 1

  @property
  def whole(self) -> int:
    """Returns S, the tokens of all devices."""
    return self.tokens * self.ways

  @property
  def numbers(self) -> int:
    """Returns the bytes of the document numbers of all tokens."""
    return 4 * self.whole * self.documents

  def before(self, tokens: int) -> int:
    """Returns how many of the `tokens` before a device's own others hold."""
    return min(tokens, self.whole - self.tokens)


@functools.singledispatch
def context_moved(attention: Any, cut: Cut) -> Moved:
  """Returns what one layer sends for one sequence.

  Raises:
    InputError: the attention is not registered.
  """
  raise InputError(
    f'attention = {type(attention).__name__}: the planner does not know what'
    ' it sends over mesh.context; use 1'
  )


@context_moved.register
def _latents(attention: MLAConfig, cut: Cut) -> Moved:
  """Counts latent attention: all latents are gathered."""
  size = cut.whole * cache_elements(attention, 1) * cut.width
  return Moved(size, fixed=cut.numbers)


@context_moved.register
def _groups(attention: GQAConfig, cut: Cut) -> Moved:
  """Counts grouped-query attention: keys and values of local heads."""
  size = cut.whole * cache_elements(attention, 1) * cut.width
  return Moved(size // cut.heads, fixed=cut.numbers)


@context_moved.register
def _native(attention: NSAConfig, cut: Cut) -> Moved:
  """Counts native sparse attention: keys gathered, blocks, near tokens."""
  a = attention
  token = a.kv_heads // cut.heads * (a.qk_dim + a.v_dim) * cut.width
  blocks = cut.ways * -(-cut.tokens // a.stride)
  # Selection reads all keys and values, compression all blocks; a block or
  # window that begins on the device before reads its last tokens.
  return Moved(
    (cut.whole + blocks) * token,
    (cut.before(a.block - 1) + cut.before(a.window - 1)) * token,
    4 * blocks + cut.numbers,
  )


@context_moved.register
def _shared(attention: SharedKVConfig, cut: Cut) -> Moved:
  """Counts V4's attention: window from the neighbour, entries gathered."""
  a, C, width = attention, attention.head_dim, cut.width
  window = cut.before(a.window - 1)
  near, fixed_near = window * C * width, 4 * window
  if a.compress == 'none':
    return Moved(0, near, 0, fixed_near)
  make = a.compressor()
  entries = cut.ways * -(-cut.tokens // make.ratio)
  wide = C + (a.csa.index_dim if a.compress == 'csa' else 0)
  before = cut.before(make.series * make.ratio - 1)
  # Projections and gates are float32; positions and documents int32.
  near += before * 2 * make.series * wide * 4
  fixed_near += before * 2 * 4
  # A byte per entry marks whether it exists; visibility needs all positions.
  fixed = entries + 4 * cut.whole + cut.numbers
  return Moved(entries * wide * width, near, fixed, fixed_near)
