"""Describes a transformer as data, and what order its layers have.

`TransformerConfig` holds one sub-config per idea and a layout that names kinds
of blocks; it expands into segments, short patterns of blocks that repeat and
are scanned over.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from deepseek_jax.config import above, at_least, check_choices, name_dtypes
from deepseek_jax.config_changes import changed_by
from deepseek_jax.errors import InputError
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.latent_reading import GROUP
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.block import AttentionConfig, BlockConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.lora import LoRAConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.residual import ResidualConfig
from deepseek_jax.parallel import processor


@dataclasses.dataclass(frozen=True)
class Kind:
  """Describes a kind of block that a layout can name.

  Attributes:
    ffn: which sub-config is its FFN, 'ffn' (dense) or 'moe'.
    change: where it departs from the model's sub-configs, as pairs of a
      dotted field and a value: (('attention.rope.theta', 160000.0),).
    engram: whether it begins with an Engram.
  """

  ffn: Literal['ffn', 'moe'] = 'moe'
  change: tuple = ()
  engram: bool = False

  def __post_init__(self):
    """Raises InputError unless `change` is a sequence of pairs."""
    some = isinstance(self.change, tuple | list)
    pair = lambda c: isinstance(c, tuple | list) and len(c) == 2
    if not some or not all(pair(c) and type(c[0]) is str for c in self.change):
      raise InputError(
        f"kind.change = {self.change!r}: write pairs, (('field', value),)"
      )


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """Describes how the same numbers are computed.

  Attributes:
    dtype: of activations and matmuls; norms, router and softmax stay float32.
      None takes what the machine multiplies fastest: bfloat16 on a GPU and on
      a CPU with AMX, else float32. A run chooses once, when it begins, and
      writes down what.
      On a GPU JAX multiplies float32 as TF32 (10 bits of mantissa) unless
      jax_default_matmul_precision says otherwise; only the products of router
      and hyper-connections ask for all of float32.
    scan: layers of a segment are scanned over (else unrolled).
    remat: what the backward pass recomputes: nothing, all but matmul
      outputs, or whole layers.
    kernels: None takes kernels where the device has them, and the layers' own
      code elsewhere; 'gpu', 'tpu' and 'reference' force them or what they are
      checked against, and 'tpu' leaves what has no kernel for TPUs to XLA;
      'cudnn' is None with cuDNN for causal attention of rows that are not
      packed.
    xla: XLA's options for training steps, held-out losses and prefill, as
      pairs (('name', 'value'),); None takes those known to gain on the CPU at
      hand (parallel/processor.py). A run chooses once, as for dtype. They
      change results by rounding alone, so they may change as a run goes on.
    cache: format of the latents that decoding keeps. 'float8' stores them as
      e4m3 with a float32 scale per 128 numbers and their rotary keys as
      bfloat16: 656 bytes a token and layer in place of V3's 1,152, for MLA and
      DSA. DSA's index keys are e4m3 then, too, with a float32 scale each, which
      is a power of two: 132 bytes in place of V3.2's 256, and queries are to
      score them. Training keeps no cache; what is sampled departs a little.
  """

  dtype: Literal['float32', 'bfloat16'] | None = 'float32'
  scan: bool = True
  remat: Literal['none', 'dots', 'full'] = 'none'
  kernels: Literal['reference', 'gpu', 'tpu', 'cudnn'] | None = None
  xla: tuple | None = None
  cache: Literal['compute', 'float8'] = 'compute'

  def __post_init__(self):
    """Raises InputError for an unknown choice, or no pairs."""
    name_dtypes(self, 'dtype')
    pair = lambda p: isinstance(p, tuple | list) and len(p) == 2
    texts = lambda p: pair(p) and all(type(part) is str for part in p)
    if self.xla is not None and not all(map(texts, self.xla)):
      raise InputError(
        f'compute.xla = {self.xla!r}: write pairs of texts,'
        " (('name', 'value'),)"
      )
    if self.kernels not in (None, 'reference', 'gpu', 'tpu', 'cudnn'):
      raise InputError(
        f"compute.kernels = {self.kernels!r}: use None, 'reference', 'gpu',"
        " 'tpu' or 'cudnn'"
      )
    if self.cache not in ('compute', 'float8'):
      raise InputError(
        f"compute.cache = {self.cache!r}: use 'compute' or 'float8'"
      )

  @property
  def products(self) -> str:
    """Returns the dtype of products: `dtype`, or the machine's choice."""
    return self.dtype or processor.dtype()

  def chosen(self) -> 'ComputeConfig':
    """Returns the same with what is left to the machine filled in."""
    xla = processor.options('train', self.xla)
    return dataclasses.replace(
      self, dtype=self.products, xla=tuple(xla.items())
    )


@dataclasses.dataclass(frozen=True)
class Segment:
  """Holds a pattern of blocks, applied `repeat` times."""

  blocks: tuple[BlockConfig, ...]
  repeat: int


class Layer(NamedTuple):
  """Describes one layer of a model, and where its variables lie.

  Attributes:
    number: in order, from 0.
    segment, place: its variables are below ['segments'][segment][place] ...
    repeat: ... at this index of their leading axis.
    block: its configuration.
  """

  number: int
  segment: int
  place: int
  repeat: int
  block: BlockConfig

  def of(self, tree: Mapping, default: Any = None) -> Any:
    """Returns what a tree of variables has of this layer's stack."""
    segments = tree.get('segments', {})
    return segments.get(self.segment, {}).get(self.place, default)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Describes everything about a model.

  Attributes:
    vocab_size: V.
    dim: D.
    layout: pairs (names of kinds, repeat), e.g.
      ((('dense',), 3), (('moe',), 58)).
    attention, ffn, moe, residual: the shared sub-configs, one per idea.
    kinds: the kinds that the layout's names stand for.
    mtp: multi-token prediction.
    engram: the Engram of the kinds that have one.
    lora: weights that learn a low-rank product; the rest is then frozen, unless
      train.trainable names it.
    norm_eps: of the block norms and the final norm.
    init_std: of every weight matrix at initialisation.
    tied: embedding and head are one matrix.
    compute: how, not what, is computed.
  """

  vocab_size: int
  dim: int
  layout: tuple
  attention: AttentionConfig
  ffn: FFNConfig | None = None
  moe: MoEConfig | None = None
  residual: ResidualConfig | HyperConnectionsConfig = ResidualConfig()
  kinds: dict[str, Kind] = dataclasses.field(
    default_factory=lambda: {'dense': Kind('ffn'), 'moe': Kind('moe')}
  )
  mtp: MTPConfig = MTPConfig(depth=0)
  engram: EngramConfig | None = None
  lora: LoRAConfig | None = None
  norm_eps: float = 1e-6
  init_std: float = 0.006
  tied: bool = False
  compute: ComputeConfig = ComputeConfig()

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    check_choices(self)
    at_least(self, vocab_size=1, dim=1, init_std=0)
    above(self, norm_eps=0)
    if not isinstance(self.kinds, Mapping):
      raise InputError(f'kinds = {self.kinds!r}: must be a dict of Kinds')
    if not isinstance(self.lora, LoRAConfig | None):
      raise InputError(f'lora = {self.lora!r}: must be a LoRAConfig or None')
    if not self.layout:
      raise InputError('layout = (): name at least one block')
    flat = isinstance(self.residual, ResidualConfig)
    if self.mtp.depth and self.mtp.streams and flat:
      raise InputError(
        'mtp.streams = True: the residual has one stream; use'
        ' hyper-connections or mtp.streams = False'
      )
    if self.mtp.depth and self.block(self.mtp.block).engram:
      raise InputError(
        f'mtp.block = {self.mtp.block!r}: has an Engram, which prediction'
        ' blocks cannot have; choose a kind with engram = False'
      )
    for block in [b for s in self.segments() for b in s.blocks]:
      check_choices(block)  # kinds may change whole parts
      router = getattr(block.ffn, 'router', None)
      hashed = getattr(router, 'hash_vocab', 0)
      if hashed not in (0, self.vocab_size):
        raise InputError(
          f'router.hash_vocab = {hashed}: must be vocab_size ='
          f' {self.vocab_size}, or 0'
        )
    self._check_cache()

  def _check_cache(self) -> None:
    """Raises InputError unless all attentions have the format of the cache."""
    if self.compute.cache == 'compute':
      return
    names = {name for names, _ in self.layout for name in names}
    names |= {self.mtp.block} if self.mtp.depth else set()
    for name in sorted(names):
      attention = self.block(name).attention
      sparse = type(attention) is DSAConfig
      latent = sparse or type(attention) is MLAConfig
      if not latent or attention.kv_rank % GROUP:
        raise InputError(
          f"compute.cache = 'float8': {name!r} has a"
          f' {type(attention).__name__}; it takes MLA or DSA with kv_rank a'
          f" multiple of {GROUP}; use 'compute'"
        )
      if sparse and attention.indexer.dim.bit_count() > 1:
        raise InputError(
          f"compute.cache = 'float8': {name!r} has indexer.dim ="
          f' {attention.indexer.dim}; index keys in float8 have a power of two'
          " of numbers; use 'compute'"
        )

  @property
  def layers(self) -> int:
    """Returns L, without the blocks of multi-token prediction."""
    return sum(len(s.blocks) * s.repeat for s in self.segments())

  def block(self, name: str) -> BlockConfig:
    """Returns the configuration of the block that the layout calls `name`.

    Raises:
      InputError: an unknown name, or a kind that lacks its sub-config.
    """
    if name not in self.kinds:
      raise InputError(
        f'layout names {name!r}: not one of kinds = {sorted(self.kinds)}'
      )
    kind = self.kinds[name]
    if not isinstance(kind, Kind):
      raise InputError(f'kinds.{name} = {kind!r}: must be a Kind')
    parts = {
      'attention': self.attention,
      'ffn': self.ffn,
      'moe': self.moe,
      'residual': self.residual,
    }
    for path, _ in kind.change:
      top = path.partition('.')[0]
      if top not in parts:
        raise InputError(f'kinds.{name}.change: no sub-config {top!r}')
    # Changes reach into sub-configs; the model's own stay as they are.
    parts = changed_by(parts, kind.change)
    ffn = parts[kind.ffn]
    if ffn is None:
      raise InputError(
        f'layout names {name!r}, which needs {kind.ffn} = ...: it is None'
      )
    if not kind.engram:
      return BlockConfig(
        parts['attention'], ffn, parts['residual'], self.norm_eps
      )
    if self.engram is None:
      raise InputError(
        f'kinds.{name}.engram = True: needs engram = ...: it is None'
      )
    return BlockConfig(
      parts['attention'],
      ffn,
      parts['residual'],
      self.norm_eps,
      self.engram,
      self.engram.rows(len(self.engram_layers())),
    )

  def in_order(self) -> tuple[Layer, ...]:
    """Returns all layers as tokens pass through them."""
    places = (
      (i, j, repeat, block)
      for i, segment in enumerate(self.segments())
      for repeat in range(segment.repeat)
      for j, block in enumerate(segment.blocks)
    )
    return tuple(Layer(n, *place) for n, place in enumerate(places))

  def engram_layers(self) -> tuple[int, ...]:
    """Returns the numbers of the layers with an Engram, in order."""
    names = [n for names, repeat in self.layout for n in names * repeat]
    has = lambda name: name in self.kinds and self.kinds[name].engram
    return tuple(i for i, name in enumerate(names) if has(name))

  def segments(self) -> tuple[Segment, ...]:
    """Returns the layout with its names looked up.

    Raises:
      InputError: an entry that is no pair of names and a positive number.
    """
    out = []
    for entry in self.layout:
      try:
        names, repeat = entry
        ok = not isinstance(names, str) and int(repeat) == repeat > 0
      except (TypeError, ValueError, OverflowError):
        ok = False
      if not ok:
        raise InputError(
          f"layout entry {entry!r}: write (('kind', ...), repeat)"
        )
      out.append(Segment(tuple(self.block(n) for n in names), int(repeat)))
    return tuple(out)
