"""Routing on Hopper: 64 tokens a thread block, their experts among warpgroups.

The layout of a wgmma accumulator gives each token to four threads, so a
maximum over experts is a few shuffles. Scores for the choice stay in registers
as integers of the same order. In a round each of four warpgroups puts up its
best expert, all read the four, and the one that is chosen, the lowest of
equals, is crossed out by its owner; -inf is a score like any other.
Legend: N tokens, E experts, K chosen, G groups, W experts of a warpgroup.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.ordered import NOTHING, ordered
from pallas_kernels.router.reference import Rule
from pallas_kernels.warpgroups import meet, wide

TOKENS, WARPGROUPS = 64, 4
_NOWHERE = 2**30  # above every expert
_TILE = plgpu.Layout.WGMMA
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(1)
_BY_EXPERT = plgpu.Layout.WGMMA.reduce(0)


def route(
  logits: jax.Array, bias: jax.Array | None, top_k: int, rule: Rule
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns experts [N K], weights [N K] and counts [E]."""
  N, E = logits.shape
  if logits.dtype != jnp.float32:
    raise NotImplementedError(f'logits are {logits.dtype}, not float32')
  if E % 8:
    raise NotImplementedError(f'{E} experts, not a multiple of 8')
  if E > 512:
    # 640 experts spill 52 bytes.
    raise NotImplementedError(f'{E} experts, more than 512')
  if rule.groups > 16:
    raise NotImplementedError(f'{rule.groups} groups, more than 16')
  if _bytes(E, top_k, rule) > compat.SHARED_MEMORY:
    raise NotImplementedError(
      f'{top_k} of {E} experts need {_bytes(E, top_k, rule)} bytes of shared '
      f'memory, more than {compat.SHARED_MEMORY}'
    )
  blocks = -(-N // TOKENS)
  # Experts that fill up a last warpgroup come behind all others.
  more = WARPGROUPS * _width(E) - E
  padded = jnp.pad(
    logits, ((0, blocks * TOKENS - N), (0, more)), constant_values=-jnp.inf
  )
  bias = jnp.zeros(E, jnp.float32) if bias is None else bias
  bias = jnp.pad(bias, (0, more), constant_values=-jnp.inf)
  shape = (blocks, top_k, TOKENS)
  experts, weights = compat.kernel(
    functools.partial(_body, E=E, rule=rule),
    (
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
    ),
    grid={'block': blocks},
    threads=WARPGROUPS,
    across_warps=False,
    scratch={
      **{
        name: plgpu.SMEM(size, jnp.int32 if whole else jnp.float32)
        for name, (size, whole) in _arrays(E, top_k, rule).items()
      },
      'met': plgpu.Barrier(num_arrivals=WARPGROUPS),
    },
  )(padded, bias)
  by_token = lambda a: a.swapaxes(1, 2).reshape(-1, top_k)[:N]
  experts = by_token(experts)
  counts = (experts.reshape(-1, 1) == jnp.arange(E)).sum(0, dtype=jnp.int32)
  return experts, by_token(weights), counts


def _width(E: int) -> int:
  """Returns W, a multiple of 8."""
  return 8 * -(-E // (8 * WARPGROUPS))


def _row(E: int) -> int:
  """Returns the length of a row of scores in shared memory.

  An odd multiple of 8: then the 8 rows of 32 bytes that a warp reads at once
  are in different banks.
  """
  return WARPGROUPS * _width(E) + 8


def _arrays(E: int, top_k: int, rule: Rule) -> dict[str, tuple]:
  """Returns shape and whether it holds integers of each array of a block."""
  row = (TOKENS, _row(E))
  chosen, exchange = (top_k, TOKENS), (2, WARPGROUPS, TOKENS)
  groups = -(-rule.groups // WARPGROUPS) * WARPGROUPS
  grouped = {'biased': (row, False), 'ranks': ((groups, TOKENS), False)}
  return {
    'kept': (row, False),
    'picks': (chosen, True),
    'gains': (chosen, False),
    # Of rounds by turns: one is read while the next is written.
    'bests': (exchange, True),
    'founds': (exchange, True),
    'sums': (exchange, False),
    **(grouped if rule.groups > 1 else {}),
  }


def _bytes(E: int, top_k: int, rule: Rule) -> int:
  """Returns the shared memory of a block, each array rounded up to 1 KiB."""
  arrays = _arrays(E, top_k, rule).values()
  size = lambda shape: 4 * math.prod(shape)
  return sum(-(-size(shape) // 1024) * 1024 for shape, _ in arrays) + 1024


def _unnormalised(
  x: jax.Array, scoring: str, top: jax.Array | None
) -> jax.Array:
  """Returns scores of logits x; softmax is not divided by its sum yet."""
  if scoring == 'sigmoid':
    return 1.0 / (1.0 + jnp.exp(-x))
  if scoring == 'softmax':
    return jnp.exp(x - wide(top, x.shape))
  small = jnp.exp(-jnp.abs(x))
  # log(1 + small) loses small below 1e-3 or so; its series does not.
  series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0)))
  log = jnp.where(small < 1e-2, series, jnp.log(1.0 + small))
  root = compat.sqrt(jnp.maximum(x, 0.0) + log)
  # Far below 0 softplus is exp, which underflows long before its root does.
  return jnp.where(x < -20.0, jnp.exp(0.5 * x), root)


def _pieces(start: jax.Array, size: int) -> list[pl.Slice]:
  """Returns slices of `size` experts that leave registers to spare."""
  at = lambda i: pl.multiple_of(start + i, 8)
  return [pl.ds(at(i), min(64, size - i)) for i in range(0, size, 64)]


def _columns(part: pl.Slice) -> jax.Array:
  """Returns the expert number of each entry of a piece."""
  shape = (TOKENS, part.size)
  return part.start + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)


def _of_all(
  own: jax.Array, sums: jax.Ref, turn: int, met: jax.Ref, join: Callable
) -> jax.Array:
  """Returns join of the values [tokens] of all warpgroups, in their order."""
  sums[turn, lax.axis_index('wg')] = own
  meet(met)
  load = lambda w: compat.load(sums, (turn, w), _BY_TOKEN)
  return functools.reduce(join, map(load, range(WARPGROUPS)))


def _score(
  logits: jax.Ref,
  kept: jax.Ref,
  slices: list[pl.Slice],
  scoring: str,
  sums: jax.Ref,
  met: jax.Ref,
) -> None:
  """Stores the scores of this warpgroup's experts to `kept`."""
  fetch = lambda part: compat.load(
    logits, (slice(None), part), _TILE, optimized=False
  )
  top = total = None
  # Softmax needs the maximum over all experts first, then the sum.
  if scoring == 'softmax':
    own = functools.reduce(jnp.maximum, [fetch(p).max(axis=1) for p in slices])
    top = _of_all(own, sums, 0, met, jnp.maximum)
  for part in slices:
    scores = _unnormalised(fetch(part), scoring, top)
    kept[:, part] = scores
    if scoring == 'softmax':
      own = scores.sum(axis=1)
      total = own if total is None else total + own
  if scoring == 'softmax':
    total = _of_all(total, sums, 1, met, jnp.add)
    for part in slices:
      scores = compat.load(kept, (slice(None), part), _TILE)
      kept[:, part] = scores / wide(total, scores.shape)


def _biased(kept: jax.Ref, bias: jax.Ref, part: pl.Slice) -> jax.Array:
  """Returns what the choice goes by: scores as weights have them, plus bias."""
  scores = compat.load(kept, (slice(None), part), _TILE)
  lift = compat.load(bias, part, _BY_EXPERT, optimized=False)
  choice = scores + wide(lift, scores.shape, 1)
  # A nan equals nothing, itself included; as the best it shows in a weight.
  return jnp.where(choice != choice, jnp.inf, choice)


def _first(hit: jax.Array, column: jax.Array) -> jax.Array:
  """Returns per token the lowest column that is hit."""
  return jnp.where(hit, column, _NOWHERE).min(axis=1)


def _group_score(
  biased: jax.Ref, every: int, group: jax.Array, size: int, group_score: str
) -> jax.Array:
  """Returns [tokens]: the best, or the best two, of the experts of a group."""
  start = group * size
  # Columns are loaded from a multiple of 8 on.
  window = min(-(-size // 8) * 8 + (8 if size % 8 else 0), every)
  begin = jnp.minimum(lax.div(start, 8) * 8, every - window)
  best = second = compat.full((TOKENS,), -jnp.inf, _BY_TOKEN)
  for part in _pieces(begin, window):
    choice = compat.load(biased, (slice(None), part), _TILE)
    column = _columns(part)
    inside = (column >= start) & (column < start + size)
    choice = jnp.where(inside, choice, -jnp.inf)
    top = choice.max(axis=1)
    if group_score == 'top2':
      first = _first(choice == wide(top, choice.shape), column)
      other = jnp.where(column == wide(first, choice.shape), -jnp.inf, choice)
      own = jnp.maximum(jnp.minimum(best, top), other.max(axis=1))
      second = jnp.maximum(second, own)
    best = jnp.maximum(best, top)
  if group_score == 'max':
    return best
  total = best + second
  return jnp.where(total != total, jnp.inf, total)  # inf - inf


def _ahead(ranks: jax.Ref, group: jax.Array, rule: Rule) -> jax.Array:
  """Returns [tokens] how many groups win against a group.

  Those are better, or as good and earlier.
  """
  own = compat.load(ranks, group, _BY_TOKEN)
  ahead = compat.full((TOKENS,), 0, _BY_TOKEN, jnp.int32)
  for i in range(rule.groups):
    other = compat.load(ranks, i, _BY_TOKEN)
    earlier = (i < group).astype(jnp.int32)
    ahead += (other > own).astype(jnp.int32)
    ahead += (other == own).astype(jnp.int32) * earlier
  return ahead


def _limited(
  choices: list[jax.Array],
  slices: list[pl.Slice],
  biased: jax.Ref,
  ranks: jax.Ref,
  met: jax.Ref,
  E: int,
  rule: Rule,
) -> list[jax.Array]:
  """Returns the choices with all but the best groups at -inf."""
  w, size = lax.axis_index('wg'), E // rule.groups
  for part, choice in zip(slices, choices, strict=True):
    biased[:, part] = choice
  meet(met)
  # Groups: every fourth one's score is this warpgroup's to find.
  for i in range(ranks.shape[0] // WARPGROUPS):
    slot = WARPGROUPS * i + w
    group = jnp.minimum(slot, rule.groups - 1)
    every = WARPGROUPS * _width(E)
    ranks[slot] = _group_score(biased, every, group, size, rule.group_score)
  meet(met)
  # Limit: of the groups that this warpgroup's experts may be in.
  width = _width(E)
  some = width // size if width % size == 0 else width // size + 2
  out = list(choices)
  for i in range(min(some, rule.groups)):
    group = jnp.minimum(lax.div(w * width, size) + i, rule.groups - 1)
    ahead = _ahead(ranks, group, rule)
    for j, part in enumerate(slices):
      column = _columns(part)
      inside = (column >= group * size) & (column < (group + 1) * size)
      lost = wide(ahead, column.shape) >= rule.top_groups
      out[j] = jnp.where(lost & inside, -jnp.inf, out[j])
  return out


def _body(
  logits: jax.Ref, bias: jax.Ref, experts: jax.Ref, weights: jax.Ref, *,
  E: int, rule: Rule, kept: jax.Ref, picks: jax.Ref, gains: jax.Ref,
  bests: jax.Ref, founds: jax.Ref, sums: jax.Ref, met: jax.Ref,
  biased: jax.Ref | None = None, ranks: jax.Ref | None = None,
) -> None:  # fmt: skip
  """Routes 64 tokens."""
  block, w = lax.axis_index('block'), lax.axis_index('wg')
  top_k = picks.shape[0]
  own = _pieces(w * _width(E), _width(E))
  # Scores: to shared memory for the weights.
  rows = logits.at[pl.ds(block * TOKENS, TOKENS)]
  _score(rows, kept, own, rule.scoring, sums, met)
  # Choice: in registers, as integers.
  choices = [_biased(kept, bias, part) for part in own]
  if rule.groups > 1:
    choices = _limited(choices, own, biased, ranks, met, E, rule)

  def pick(k: jax.Array, left: tuple) -> tuple:
    turn = lax.rem(k, 2)
    # Best of this warpgroup: of equals the lowest.
    tops = [some.max(axis=1) for some in left]
    top = functools.reduce(jnp.maximum, tops)
    hits = [
      _first(some == wide(top, some.shape), _columns(part))
      for some, part in zip(left, own, strict=True)
    ]
    bests[turn, w] = top
    founds[turn, w] = functools.reduce(jnp.minimum, hits)
    meet(met)
    # Best of all: warpgroups are in the order of their experts.
    best = compat.load(bests, (turn, 0), _BY_TOKEN)
    found = compat.load(founds, (turn, 0), _BY_TOKEN)
    for other in range(1, WARPGROUPS):
      value = compat.load(bests, (turn, other), _BY_TOKEN)
      expert = compat.load(founds, (turn, other), _BY_TOKEN)
      better = value > best
      best = jnp.where(better, value, best)
      found = jnp.where(better, expert, found)

    @pl.when(w == 0)
    def _():
      picks[k] = found

    # Cross out: below the integer of every score.
    gone = lambda part: _columns(part) == wide(found, (TOKENS, part.size))
    return tuple(
      jnp.where(gone(part), NOTHING, some)
      for some, part in zip(left, own, strict=True)
    )

  lax.fori_loop(0, top_k, pick, tuple(map(ordered, choices)))
  meet(met)

  # Weights: the score of each choice, from the warpgroup that holds it.
  def gather(k: jax.Array, total: jax.Array) -> jax.Array:
    found = compat.load(picks, k, _BY_TOKEN)
    gain = compat.full((TOKENS,), 0.0, _BY_TOKEN)
    for part in own:
      scores = compat.load(kept, (slice(None), part), _TILE)
      hit = _columns(part) == wide(found, scores.shape)
      gain += jnp.where(hit, scores, 0.0).sum(axis=1)
    gain = _of_all(gain, sums, lax.rem(k, 2), met, jnp.add)

    @pl.when(w == 0)
    def _():
      gains[k] = gain

    return total + gain

  zero = compat.full((TOKENS,), 0.0, _BY_TOKEN)
  total = lax.fori_loop(0, top_k, gather, zero)
  out = experts.at[block], weights.at[block]
  pl.when(w == 0)(lambda: _store(picks, gains, total, *out, rule))


def _store(
  picks: jax.Ref,
  gains: jax.Ref,
  total: jax.Array,
  experts: jax.Ref,
  weights: jax.Ref,
  rule: Rule,
) -> None:
  """Stores choices and weights, without the bias, over the chosen ones' sum."""
  norm = total + rule.eps if rule.normalize else jnp.ones_like(total)

  def rescale(k: jax.Array, _) -> tuple:
    gains[k] = compat.load(gains, k, _BY_TOKEN) / norm * rule.scale
    return ()

  lax.fori_loop(0, picks.shape[0], rescale, ())
  # Choice first, token second, so that a row is one copy.
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(picks, experts)
  plgpu.copy_smem_to_gmem(gains, weights)
  plgpu.wait_smem_to_gmem(0)
