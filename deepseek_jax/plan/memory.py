"""Counts bytes on a device by class, KV cache, and checkpoint size.

State follows the parameters' shares of a mesh exactly; activations follow the
blocks' own programs. Legend: D model, V vocabulary, K experts per token.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from deepseek_jax.config import above, at_least, name_dtypes
from deepseek_jax.errors import InputError
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel import exchange, rounds
from deepseek_jax.pipeline.cut import stage_places
from deepseek_jax.plan import device_shares as meshes
from deepseek_jax.plan.activations import kept_bytes
from deepseek_jax.plan.attention import cache_bytes_fp8, cache_elements
from deepseek_jax.plan.device_shares import DeviceShare, Mesh
from deepseek_jax.plan.flops import blocks
from deepseek_jax.train.optimizer import OptimizerConfig, moment_count

BYTES = {'float32': 4, 'bfloat16': 2, 'float8': 1}
CLASSES = (
  'weights',
  'master weights',
  'gradients',
  'moments',
  'activations',
  'expert exchange',
  'logits',
)
_ADAMW = OptimizerConfig()
_LOGIT_CHUNK = 1024  # tokens at a time, see losses.linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class Training:
  """Describes what a training step keeps in memory, and how it is sharded.

  Attributes:
    seq_len: tokens of a sequence.
    micro_batch: sequences that a device works on at a time.
    optimizer: decides how many moments there are, and their dtype.
    zero: 0: optimizer state lies as the parameters do; 1: moments and master
      weights are split over every device that holds the same parameters.
    dispatch: dtype of tokens sent to experts; float8 adds a float32 scale per
      128 numbers. Combine sends bfloat16.
    schedule: pipeline schedule, '1f1b', 'zb1p', 'dualpipe' or 'dualpipev'.
    exchange_factor: rows of an expert exchange's buffers, as a multiple of an
      even share.
  """

  seq_len: int = 4096
  micro_batch: int = 1
  optimizer: OptimizerConfig = OptimizerConfig()
  zero: Literal[0, 1] = 0
  dispatch: Literal['float32', 'bfloat16', 'float8'] = 'bfloat16'
  schedule: Literal['1f1b', 'zb1p', 'dualpipe', 'dualpipev'] = '1f1b'
  exchange_factor: float = exchange.ExchangeConfig.factor

  def __post_init__(self):
    """Raises InputError where a number is out of its range."""
    name_dtypes(self, 'dispatch')
    at_least(self, seq_len=1, micro_batch=1)
    above(self, exchange_factor=0)

  @property
  def both_ends(self) -> bool:
    """Returns whether a rank holds two stages."""
    return self.schedule in ('dualpipe', 'dualpipev')


def row_bytes(dim: int, dtype: str) -> int:
  """Returns the bytes of one token on its way to an expert.

  Args:
    dim: numbers of the token.
    dtype: a key of BYTES; float8 adds a float32 scale per 128 numbers.
  """
  scales = 4 * -(-dim // 128) if dtype == 'float8' else 0
  return dim * BYTES[dtype] + scales


def replicas(share: DeviceShare, mesh: Mesh) -> int:
  """Returns how many devices of one stage add up a parameter's gradient.

  They hold the same shard of the parameter and work on different tokens.
  """
  axes = ('data', 'fsdp', 'expert', 'context')
  return math.prod(getattr(mesh, a) for a in axes if a not in share.over)


def moment_bytes(optimizer: OptimizerConfig, share: DeviceShare) -> int:
  """Returns the bytes of a number's moments; Muon's placeholders count none."""
  return BYTES[optimizer.moments] * moment_count(optimizer, share.axes)


def state_bytes(
  config: TransformerConfig,
  held: list[DeviceShare],
  mesh: Mesh,
  training: Training,
  copies: int = 1,
) -> dict[str, int]:
  """Returns bytes of weights, master weights, gradients and moments.

  Args:
    config: its compute dtype decides whether weights are a copy.
    held: what the device holds.
    mesh: where.
    training: optimizer and ZeRO stage.
    copies: ranks that hold the same stage (DualPipe: 2).
  """
  compute = BYTES[config.compute.products]
  optimizer = training.optimizer
  out = dict.fromkeys(CLASSES[:4], 0)
  for share in held:
    n = share.elements
    # Buffers are float32, without gradients and moments.
    if not share.trained and not share.matrix:
      out['weights'] += 4 * n
      continue
    split = copies * replicas(share, mesh) if training.zero else 1
    # Only matrices are copied to the compute dtype.
    width = compute if share.matrix else 4
    if width == 4 and split == 1:
      out['weights'] += 4 * n  # the master weights themselves
    else:
      out['weights'] += width * n
      out['master weights'] += 4 * -(-n // split)
    if share.trained:
      out['gradients'] += 4 * n
      out['moments'] += moment_bytes(optimizer, share) * -(-n // split)
  return out


def _chunks_alive(mesh: Mesh, training: Training, rank: int) -> list[int]:
  """Returns micro-batches alive per stage of `rank`, at its worst."""
  P = mesh.stage
  if P == 1:
    return [1]
  if training.both_ends:
    # P + 1 chunks over both: V3, table 2; the early stage holds more.
    early = P - min(rank, P - 1 - rank)
    late = P + 1 - early
    return [early, late] if rank < P // 2 else [late, early]
  return [P - rank]


def activation_bytes(
  config: TransformerConfig,
  mesh: Mesh,
  training: Training,
  rank: int = 0,
  policy: str | None = None,
) -> int:
  """Returns the bytes that blocks of a rank keep for their backward pass.

  Every block keeps what its policy saves, for each micro-batch alive; the
  block being differentiated needs all of its own. The tensor axis divides
  heads and hidden numbers; the context axis is taken to divide all, which
  leaves out what it repeats.
  """
  policy = config.compute.remat if policy is None else policy
  runs = stage_places(config, mesh.stage)
  held = [rank]
  if training.both_ends and mesh.stage > 1:
    held = [rank, mesh.stage - 1 - rank]
  layers = [b for s in config.segments() for b in s.blocks * s.repeat]
  saved = most = 0
  for stage, alive in zip(held, _chunks_alive(mesh, training, rank)):
    for place in runs[stage]:
      if place[0] not in ('block', 'mtp'):
        continue
      mtp = place[0] == 'mtp'
      block = config.block(config.mtp.block) if mtp else layers[place[1]]
      kept = kept_bytes(config, block, training.seq_len, mesh.tensor)
      saved += alive * getattr(kept, policy)
      # While it is differentiated, a block needs what its policy dropped, too.
      most = max(most, kept.none - getattr(kept, policy))
  return training.micro_batch * (saved + most) // mesh.context


def exchange_bytes(
  config: TransformerConfig, mesh: Mesh, training: Training
) -> int:
  """Returns the bytes of one layer's dispatch and combine buffers.

  A copy of a token travels per chosen expert. Every device of the expert axis
  has a buffer of `exchange_factor` even shares, filled or not, as
  `rounds.share` makes it.
  """
  n = mesh.expert
  if n == 1:
    return 0
  tokens = training.micro_batch * training.seq_len // mesh.context
  rows = [
    n
    * rounds.share(
      tokens * moe.top_k,
      n,
      tokens * min(moe.top_k, moe.experts // n),
      training.exchange_factor,
    )
    for moe in (block.ffn for block, _ in blocks(config))
    if isinstance(moe, MoEConfig)
  ]
  there = row_bytes(config.dim, training.dispatch)
  return max(rows, default=0) * (there + row_bytes(config.dim, 'bfloat16'))


def logit_bytes(
  config: TransformerConfig, mesh: Mesh, training: Training
) -> int:
  """Returns the bytes of a chunk of float32 logits and of their gradient."""
  tokens = training.micro_batch * training.seq_len // mesh.context
  vocab = config.vocab_size // mesh.tensor
  return 2 * 4 * min(tokens, _LOGIT_CHUNK) * vocab


def device_bytes(
  config: TransformerConfig,
  mesh: Mesh,
  training: Training = Training(),
  *,
  policy: str | None = None,
  held: Mapping | None = None,
) -> tuple[dict[str, int], ...]:
  """Returns bytes by class on a device of each pipeline rank.

  Args:
    config: a model.
    mesh: axis sizes.
    training: what is kept, and how.
    policy: remat policy; by default the model's.
    held: `mesh.shares` of other rules, or to save computing them again.
  """
  held = meshes.shares(config, mesh) if held is None else held
  copies = 2 if training.both_ends and mesh.stage > 1 else 1
  out = []
  places = meshes.ranks(config, mesh, both_ends=training.both_ends)
  for rank, mine in enumerate(places):
    flat = [share for place in mine for share in held[place]]
    classes = state_bytes(config, flat, mesh, training, copies)
    classes['activations'] = activation_bytes(
      config, mesh, training, rank, policy
    )
    classes['expert exchange'] = exchange_bytes(config, mesh, training)
    end = ('end',) in mine
    classes['logits'] = logit_bytes(config, mesh, training) if end else 0
    out.append(classes)
  return tuple(out)


@dataclasses.dataclass(frozen=True)
class CacheMemory:
  """Holds the size of the KV cache of one sequence.

  Attributes:
    length: its tokens.
    elements: numbers in all layers.
    bf16: their bytes as bfloat16.
    fp8: bytes of 8-bit records; None if a layer has no such record.
    configured: bytes in the format that compute.cache says.
  """

  length: int
  elements: int
  bf16: int
  fp8: int | None
  configured: int

  def quantized(self, bits: int) -> float:
    """Returns the bytes at so many bits per number, scales not counted."""
    return self.elements * bits / 8


def cache(config: TransformerConfig, length: int = 1) -> CacheMemory:
  """Returns the KV cache of `length` tokens; 1 gives the figure per token."""
  if length < 1:
    raise InputError(f'length = {length}: must be at least 1')
  elements, fp8 = 0, 0
  for block, repeat in blocks(config):
    elements += repeat * cache_elements(block.attention, length)
    record = cache_bytes_fp8(block.attention, length)
    fp8 = None if fp8 is None or record is None else fp8 + repeat * record
  held = fp8 if config.compute.cache == 'float8' else 2 * elements
  return CacheMemory(length, elements, 2 * elements, fp8, held)


def checkpoint_bytes(
  config: TransformerConfig,
  optimizer: OptimizerConfig = _ADAMW,
  held: Mapping | None = None,
) -> int:
  """Returns bytes of master weights, buffers and moments, as saved.

  Scalars (step, gate, optimizer count, one for each of Muon's parameters:
  under 1 kB) are left out.
  """
  held = meshes.shares(config, Mesh()) if held is None else held
  return sum(
    s.whole * (4 + (moment_bytes(optimizer, s) if s.trained else 0))
    for found in held.values()
    for s in found
  )
