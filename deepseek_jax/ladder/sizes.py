"""Describes how large a ladder is: widths, budgets, rates, seeds.

All rungs share one Shape. A budget is in training FLOPs as the planner counts
them, forward and backward, multi-token prediction included; each rung reads
as many tokens as it pays for.
"""

import dataclasses
import itertools

from deepseek_jax.config import above, at_least, within
from deepseek_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Shape:
  """Holds the widths of all rungs.

  Attributes:
    vocab, dim, layers: V, D and L.
    dense: leading layers whose FFN stays dense.
    heads, head_dim: of attention.
    kv_heads: of grouped queries.
    ffn: hidden width of the dense FFN; the chosen experts of a token have as
      much together.
    experts, top_k: fine-grained experts, and how many a token uses.
    coarser: fine experts that one conventional expert is as wide as.
    shared: experts of a token that every token uses.
    q_rank, kv_rank, rope_dim: of latent attention.
    index_heads, index_dim: of the indexers.
    picked: tokens that V3.2's attention reads.
    window, entries: V4's window, and the entries that CSA reads.
    entry_dim: of V4's heads and entries.
    csa_ratio, hca_ratio: tokens of an entry.
    groups, o_rank: of V4's output projection.
    rows, tables, row_dim: of the Engram, see EngramConfig (base, heads, dim).
  """

  vocab: int
  dim: int
  layers: int
  dense: int
  heads: int
  head_dim: int
  kv_heads: int
  ffn: int
  experts: int
  top_k: int
  coarser: int
  shared: int
  q_rank: int
  kv_rank: int
  rope_dim: int
  index_heads: int
  index_dim: int
  picked: int
  window: int
  entries: int
  entry_dim: int
  csa_ratio: int
  hca_ratio: int
  groups: int
  o_rank: int
  rows: int
  tables: int
  row_dim: int

  def __post_init__(self) -> None:
    """Raises InputError for widths that make no ladder."""
    names = [field.name for field in dataclasses.fields(self)]
    at_least(self, 'shape.', **dict.fromkeys(names, 1))
    for name in ('top_k', 'experts'):
      if getattr(self, name) % self.coarser:
        raise InputError(
          f'shape.coarser = {self.coarser}: must divide {name} ='
          f' {getattr(self, name)}'
        )
    if self.ffn % self.top_k:
      raise InputError(
        f'shape.ffn = {self.ffn}: must be a multiple of top_k = {self.top_k},'
        ' so that the experts of a token are as wide as the dense FFN'
      )
    if not self.dense < self.layers or not self.shared < self.top_k:
      raise InputError(
        f'shape.dense = {self.dense}, shape.shared = {self.shared}: must be'
        f' below layers = {self.layers} and top_k = {self.top_k}'
      )


@dataclasses.dataclass(frozen=True)
class LadderSize:
  """Describes what is trained of every rung.

  Attributes:
    shape: of the models.
    budgets: training FLOPs, rising.
    rates: peak learning rates that are tried at the smallest budget.
    anchors: rungs on which they are tried; others take the rate of the anchor
      below them, or else of the first. (): all.
    seeds: runs at the smallest budget with the chosen rate.
    seq_len, batch, warmup: tokens of a window, windows and steps.
    heldout: share of the documents that is never trained on.
    speed: FLOPs per second, by which hours are told before anything runs.
    overhead: seconds of a run beside its steps: compiling, validation.
  """

  shape: Shape
  budgets: tuple[float, ...]
  rates: tuple[float, ...]
  anchors: tuple[str, ...] = ()
  seeds: int = 2
  seq_len: int = 256
  batch: int = 2
  warmup: int = 10
  heldout: float = 0.01
  speed: float = 4e10
  overhead: float = 20.0

  def __post_init__(self) -> None:
    """Raises InputError for sizes that can't be run."""
    at_least(self, 'size.', seeds=1, seq_len=2, batch=1, warmup=0)
    above(self, 'size.', speed=0, overhead=0)
    within(self, 'size.', heldout=(0, 1), ends='()')
    for name in ('budgets', 'rates'):
      values = getattr(self, name)
      rising = all(a < b for a, b in itertools.pairwise(values))
      if not values or not rising or values[0] <= 0:
        raise InputError(
          f'size.{name} = {values}: give numbers above 0 in rising order'
        )
    if len(self.budgets) < 2:
      raise InputError(
        f'size.budgets = {self.budgets}: two at least, as a curve has'
      )


def _shape(dim: int, **changes: int) -> Shape:
  """Returns the widths of a small model, in proportion to D."""
  made = Shape(
    vocab=1024,
    dim=dim,
    layers=4,
    dense=1,
    heads=dim // 32,
    head_dim=32,
    kv_heads=dim // 64,
    ffn=3 * dim,
    experts=16,
    top_k=4,
    coarser=2,
    shared=1,
    q_rank=dim // 2,
    kv_rank=dim // 4,
    rope_dim=16,
    index_heads=4,
    index_dim=16,
    picked=64,
    window=32,
    entries=16,
    entry_dim=48,
    csa_ratio=4,
    hca_ratio=16,
    groups=2,
    o_rank=dim // 4,
    rows=8192,
    tables=4,
    row_dim=dim // 2,
  )
  return dataclasses.replace(made, **changes)


def published() -> Shape:
  """Returns V3's and V4's widths: for the planner, not to be trained.

  Grouped queries have Llama 3's 8 key heads; V4's groups, ranks and ratios are
  those of V4-Pro.
  """
  return Shape(
    vocab=129280,
    dim=7168,
    layers=61,
    dense=3,
    heads=128,
    head_dim=128,
    kv_heads=8,
    ffn=8 * 2048,
    experts=256,
    top_k=8,
    coarser=4,
    shared=1,
    q_rank=1536,
    kv_rank=512,
    rope_dim=64,
    index_heads=64,
    index_dim=128,
    picked=2048,
    window=128,
    entries=1024,
    entry_dim=512,
    csa_ratio=4,
    hca_ratio=128,
    groups=16,
    o_rank=1024,
    rows=1_000_000,
    tables=8,
    row_dim=512,
  )


SIZES = {
  'smoke': LadderSize(
    _shape(
      64,
      layers=3,
      vocab=512,
      experts=4,
      top_k=2,
      picked=8,
      window=8,
      entries=4,
      rows=64,
    ),
    budgets=(2e9, 6e9),
    rates=(4e-3,),
    seq_len=32,
    batch=2,
    warmup=2,
    heldout=0.002,
  ),
  # The rate is that of the tiny recipes; nothing is tried.
  'minutes': LadderSize(
    _shape(128, layers=3),
    budgets=(1.2e11, 2.4e11, 4.8e11),
    rates=(3e-3,),
    batch=1,
  ),
  'half_hour': LadderSize(
    _shape(128, layers=3),
    budgets=(2.4e11, 7.2e11, 2.16e12),
    rates=(1.5e-3, 3e-3, 6e-3),
    anchors=('gqa', 'coarse', 'csa', 'muon'),
  ),
  'large': LadderSize(
    _shape(256, vocab=4096, layers=6, experts=32, rows=32768),
    budgets=(1e13, 4e13, 1.6e14),
    rates=(1e-3, 2e-3, 4e-3, 8e-3),
    seeds=3,
    batch=8,
    warmup=40,
    speed=8e10,
    overhead=40.0,
  ),
}
