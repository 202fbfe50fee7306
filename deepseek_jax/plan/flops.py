"""Counts FLOPs of a configuration: per part, per pass and by convention.

A multiply-add is two FLOPs; only matmuls count, as in every published figure.
Counts are of one sequence, so that they are whole numbers. The backward pass is
twice the forward pass. Legend: D model, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from deepseek_jax.errors import InputError, check_type
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.plan.attention import Term, attention_cost

Seen = Literal['half', 'full', 'triangle', 'blocks']
CONVENTIONS = {
  'half': 'causal as papers count it: a query attends to half of the sequence',
  'full': 'not causal: a query attends to the whole sequence',
  'triangle': 'causal, exact: query t attends to t keys',
  'blocks': "what the XLA program computes: the triangle's blocks",
}
PROJECTIONS, CORE = 'attention projections', 'attention core'
INDEX = 'indexer scores'
RESIDUAL, MEMORY = 'residual streams', 'Engram'
DENSE, ROUTER = 'dense FFN', 'router'
SHARED, ROUTED = 'shared experts', 'routed experts'
HEAD, MTP = 'head', 'multi-token prediction'
PARTS = (
  PROJECTIONS,
  CORE,
  INDEX,
  DENSE,
  ROUTER,
  SHARED,
  ROUTED,
  RESIDUAL,
  MEMORY,
  HEAD,
  MTP,
)


@dataclasses.dataclass(frozen=True)
class Flops:
  """Holds the FLOPs of one sequence.

  Attributes:
    length: its tokens.
    seen: the convention of the attention core, a key of CONVENTIONS.
    forward: by part, of the forward pass.
    repeated: by part, what the backward pass recomputes.
  """

  length: int
  seen: Seen
  forward: dict[str, int]
  repeated: dict[str, int]

  @property
  def training(self) -> int:
    """Returns forward and backward FLOPs, nothing recomputed.

    This is what papers call FLOPs.
    """
    # The choice by an indexer's scores has no gradient: they count once.
    return 3 * sum(self.forward.values()) - 2 * self.forward.get(INDEX, 0)

  @property
  def executed(self) -> int:
    """Returns forward and backward FLOPs as run, recomputation included."""
    return self.training + sum(self.repeated.values())

  @property
  def per_token(self) -> float:
    """Returns training FLOPs per token."""
    return self.training / self.length


def blocks(config: TransformerConfig) -> Iterator[tuple[BlockConfig, int]]:
  """Yields every block with its repeats, segment by segment, in order."""
  fix = 'as in ds.presets.v3()'
  check_type('config', config, TransformerConfig, fix)
  for segment in config.segments():
    for block in segment.blocks:
      yield block, segment.repeat


def _blocked(length: int, most: int = 8) -> int:
  """Counts pairs that `causal_attention` computes.

  Its blocks have at least 128 queries and attend to all keys up to their end.
  """
  size = max(128, -(-length // most))
  ends = (min(i + size, length) for i in range(0, length, size))
  starts = range(0, length, size)
  return sum((end - start) * end for start, end in zip(starts, ends))


def _pairs(term: Term, length: int, seen: Seen) -> tuple[int, int]:
  """Returns the (query, key) pairs of a sequence as a fraction.

  The denominator is 2 where half of an odd square is counted.
  """
  if seen == 'half' and term.most is None:
    return length * term.keys(length), 2
  if seen in ('half', 'triangle'):
    return term.triangle(length), 1
  if seen == 'full':
    return length * term.keys(length), 1
  if seen == 'blocks' and term.stride == 1 and term.most is None:
    return _blocked(length), 1
  raise InputError(f'seen = {seen!r}: must be one of {list(CONVENTIONS)}')


def _core(
  terms: Iterable[Term], length: int, seen: Seen, scores: bool = False
) -> int:
  """Returns the FLOPs of the pairs of one sequence."""
  total = 0
  for term in terms:
    pairs, over = _pairs(term, length, seen)
    total += 2 * (term.scores if scores else term.macs) * pairs // over
  return total


def ffn_macs(ffn: Any, dim: int) -> dict[str, int]:
  """Returns the multiply-adds per token of an FFN, by part."""
  if isinstance(ffn, FFNConfig):
    return {DENSE: 3 * dim * ffn.width}
  if isinstance(ffn, MoEConfig):
    expert = 3 * dim * ffn.width
    return {
      ROUTER: dim * ffn.experts,
      SHARED: ffn.shared * expert,
      ROUTED: ffn.top_k * expert,
    }
  raise InputError(f'ffn = {type(ffn).__name__}: the planner lacks its cost')


def residual_macs(residual: Any, dim: int) -> tuple[int, int]:
  """Returns multiply-adds per token of hyper-connections.

  Returns:
    (those of a sublayer, those of the head); a plain residual has none.
  """
  n = getattr(residual, 'streams', 0)
  if not n:
    return 0, 0
  sublayer = n * dim * n * (n + 2) + (n * n + 2 * n) * dim
  return sublayer, (n * n + n) * dim


def memory_macs(block: BlockConfig, dim: int) -> int:
  """Returns the multiply-adds per token of the block's Engram."""
  if block.engram is None:
    return 0
  n, taps = block.streams, block.engram.conv if block.engram.reach else 0
  return dim * (block.engram.width * (n + 1) + n + taps * n)


def block_macs(block: BlockConfig, dim: int) -> dict[str, int]:
  """Returns the multiply-adds per token of all but the attention, by part."""
  out = ffn_macs(block.ffn, dim)
  extra = {
    RESIDUAL: 2 * residual_macs(block.residual, dim)[0],
    MEMORY: memory_macs(block, dim),
  }
  return out | {part: macs for part, macs in extra.items() if macs}


def block_flops(
  block: BlockConfig, dim: int, length: int, seen: Seen
) -> dict[str, int]:
  """Returns the forward FLOPs of one block on one sequence, by part."""
  cost = attention_cost(block.attention, dim)
  index = [t for t in cost.fresh.pairs if t.index]
  out = {
    PROJECTIONS: 2 * length * cost.fresh.query,
    CORE: _core([t for t in cost.fresh.pairs if not t.index], length, seen),
  }
  if index:
    out[INDEX] = _core(index, length, seen)
  for part, macs in block_macs(block, dim).items():
    out[part] = 2 * length * macs
  return out


def _repeated(
  block: BlockConfig, dim: int, length: int, seen: Seen, remat: str
) -> dict[str, int]:
  """Returns the FLOPs of one block that its backward pass recomputes.

  The attention core always recomputes its scores. 'dots' keeps plain matmuls,
  but neither the core nor the routed experts; 'full' keeps nothing. An FFN's
  last matmul, a third of it, is never needed again; that of routed experts is,
  for the gradient of their weights in the sum.
  """
  forward = block_flops(block, dim, length, seen)
  pairs = attention_cost(block.attention, dim).fresh.pairs
  scores = _core(pairs, length, seen, scores=True)
  again = {
    'none': (),
    'dots': (CORE, ROUTED),
    'full': tuple(forward),
  }[remat]
  out = {part: forward[part] for part in again if part in forward}
  # Nothing of the backward pass reads the output of the last matmul.
  for part in (DENSE, SHARED):
    if part in out:
      out[part] = 2 * out[part] // 3
  return {**out, CORE: out.get(CORE, 0) + scores}


def _add(total: dict, more: dict, times: int = 1) -> None:
  """Adds `times` counts of `more` to `total`, by part."""
  for part, value in more.items():
    total[part] = total.get(part, 0) + times * value


def count_flops(
  config: TransformerConfig,
  length: int,
  *,
  seen: Seen = 'half',
  mtp: bool = False,
  remat: Literal['none', 'dots', 'full'] | None = None,
) -> Flops:
  """Counts the FLOPs of training on one sequence.

  Args:
    config: a model.
    length: tokens of the sequence.
    seen: how the attention core counts, see CONVENTIONS.
    mtp: count multi-token prediction too; published figures leave it out.
    remat: what the backward pass recomputes; by default the model's policy.

  Raises:
    InputError: an unknown convention, policy or kind of layer.
  """
  if length < 1:
    raise InputError(f'length = {length}: must be at least 1')
  remat = config.compute.remat if remat is None else remat
  if remat not in ('none', 'dots', 'full'):
    raise InputError(f"remat = {remat!r}: must be 'none', 'dots' or 'full'")
  D = config.dim
  forward, repeated = {}, {}
  for block, repeat in blocks(config):
    _add(forward, block_flops(block, D, length, seen), repeat)
    _add(repeated, _repeated(block, D, length, seen, remat), repeat)
  head = 2 * length * D * config.vocab_size
  collapse = 2 * length * residual_macs(config.residual, D)[1]
  forward[HEAD] = head
  if collapse:
    _add(forward, {RESIDUAL: collapse})
  if mtp and config.mtp.depth:
    block = config.block(config.mtp.block)
    inner = sum(block_flops(block, D, length, seen).values())
    streams = block.streams if config.mtp.streams else 1
    # One depth: projections of embedding and hidden state, a block, the head.
    once = 2 * length * (1 + streams) * D * D + inner + head + collapse
    forward[MTP] = config.mtp.depth * once
    _add(repeated, _repeated(block, D, length, seen, 'none'), config.mtp.depth)
  in_order = {part: forward[part] for part in PARTS if part in forward}
  return Flops(length, seen, in_order, repeated)


def matmul_weights(config: TransformerConfig) -> int:
  """Counts weights that multiply a token.

  Head and gates are included, embedding and MTP are not.

  N_mm of training FLOPs = 6 N_mm + attention.
  """
  per_token = count_flops(config, 1).forward
  core = (CORE, INDEX)
  return sum(v for part, v in per_token.items() if part not in core) // 2


def decode_flops(
  config: TransformerConfig, length: int, queries: int = 1
) -> dict[str, int]:
  """Counts the FLOPs of `queries` new tokens that read a cache.

  The last of them attends to `length` tokens, itself included; all count alike.

  Returns:
    By form ('absorbed' and 'expanded' for latent attention); an attention
    that has just one form takes part in all.
  """
  return {
    name: sum(parts.values())
    for name, parts in decode_parts(config, length, queries).items()
  }


def decode_parts(
  config: TransformerConfig, length: int, queries: int = 1
) -> dict[str, dict[str, int]]:
  """Returns `decode_flops` by form and by 'weights', CORE and INDEX."""
  if not 1 <= queries <= length:
    raise InputError(
      f'length = {length}, queries = {queries}: must be at least 1, and not'
      ' more queries than tokens, themselves included'
    )
  names = {
    name
    for block, _ in blocks(config)
    for name in attention_cost(block.attention, config.dim).cached
  }
  out = {}
  for name in sorted(names):
    head = config.dim * config.vocab_size
    head += residual_macs(config.residual, config.dim)[1]
    parts = {'weights': 2 * queries * head, CORE: 0, INDEX: 0}
    for block, repeat in blocks(config):
      forms = attention_cost(block.attention, config.dim).cached
      # An attention with one form takes part in the sums of all.
      form = forms.get(name) or next(iter(forms.values()))
      rest = sum(block_macs(block, config.dim).values())
      weights = queries * (form.query + rest) + length * form.key
      parts['weights'] += 2 * repeat * weights
      for term in form.pairs:
        each = 2 * repeat * queries * term.macs * term.keys(length)
        parts[INDEX if term.index else CORE] += each
    out[name] = parts
  return out


def standard_flops(
  layers: int,
  dim: int,
  vocab: int,
  length: int | None = None,
  *,
  ffn_units: float = 1.0,
) -> float:
  """Returns training FLOPs per token as DeepSeek LLM counts them.

  arXiv:2401.02954: 72 L D^2 + 12 L D s + 6 D V: a layer is 4 D^2 of attention
  and `ffn_units` FFNs of 8 D^2, whatever its true widths; the embedding is not
  counted.

  Args:
    layers, dim, vocab: L, D, V.
    length: s, non-causal; None leaves the attention core out.
    ffn_units: active FFNs of 8 D^2 (DeepSeekMoE 16B: 8 experts of a quarter).
  """
  core = 0 if length is None else 12 * layers * dim * length
  weights = (24 + 48 * ffn_units) * layers * dim**2
  return weights + core + 6 * dim * vocab
