"""Routing on Hopper: 64 tokens per warpgroup, their scores in shared memory.

The layout of a wgmma accumulator gives each token to four threads, so a
maximum over experts is a few shuffles. Round k finds the best score after that
of round k - 1, in an order where equals follow their index: nothing has to be
crossed out, and -inf is a score like any other. Scores come into registers 64
experts at a time, so that many experts don't spill.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat
from pallas_kernels.router.reference import Rule

TOKENS = 64
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
  if rule.groups > 16:
    raise NotImplementedError(f'{rule.groups} groups, more than 16')
  if rule.groups > 1 and E > 384:
    # 424 experts in 8 groups spill 76 bytes with jax 0.12.
    raise NotImplementedError(f'{E} experts in groups, more than 384')
  if _bytes(E, top_k) > compat.SHARED_MEMORY:
    raise NotImplementedError(
      f'{top_k} of {E} experts need {_bytes(E, top_k)} bytes of shared '
      f'memory, more than {compat.SHARED_MEMORY}'
    )
  blocks = -(-N // TOKENS)
  padded = jnp.pad(logits, ((0, blocks * TOKENS - N), (0, 0)))
  bias = jnp.zeros(E, jnp.float32) if bias is None else bias
  shape = (blocks, top_k, TOKENS)
  experts, weights, counts = compat.kernel(
    functools.partial(_body, top_k=top_k, rule=rule, tokens=N),
    (
      jax.ShapeDtypeStruct(shape, jnp.int32),
      jax.ShapeDtypeStruct(shape, jnp.float32),
      jax.ShapeDtypeStruct((blocks, E), jnp.float32),
    ),
    grid={'block': blocks},
    scratch={
      'kept': plgpu.SMEM((TOKENS, _row(E)), jnp.float32),
      'biased': plgpu.SMEM((TOKENS, _row(E)), jnp.float32),
      'picks': plgpu.SMEM((top_k, TOKENS), jnp.int32),
      'gains': plgpu.SMEM((top_k, TOKENS), jnp.float32),
      'counted': plgpu.SMEM((E,), jnp.float32),
    },
  )(padded, bias)
  by_token = lambda a: a.swapaxes(1, 2).reshape(-1, top_k)[:N]
  # Each block has counted its own: no atomics, the same bits in every run.
  counts = counts.astype(jnp.int32).sum(axis=0)
  return by_token(experts), by_token(weights), counts


def _row(E: int) -> int:
  """Returns the length of a row of E scores in shared memory.

  An odd multiple of 8: then the 8 rows of 32 bytes that a warp reads at once
  are in different banks.
  """
  return E + 8 if E % 16 == 0 else E


def _bytes(E: int, top_k: int) -> int:
  """Returns the shared memory of a block, each array rounded up to 1 KiB."""
  arrays = 2 * [TOKENS * _row(E)] + 2 * [TOKENS * top_k] + [E]
  reductions = 2048
  return sum(-(-4 * n // 1024) * 1024 for n in arrays) + reductions


def _wide(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Returns a vector [tokens] broadcast to `shape`."""
  return lax.broadcast_in_dim(values, shape, [0])


def _unnormalised(
  x: jax.Array, scoring: str, top: jax.Array | None
) -> jax.Array:
  """Returns scores of logits x; softmax is not divided by its sum yet."""
  if scoring == 'sigmoid':
    return 1.0 / (1.0 + jnp.exp(-x))
  if scoring == 'softmax':
    return jnp.exp(x - _wide(top, x.shape))
  small = jnp.exp(-jnp.abs(x))
  # log(1 + small) loses small below 1e-3 or so; its series does not.
  series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0)))
  log = jnp.where(small < 1e-2, series, jnp.log(1.0 + small))
  root = compat.sqrt(jnp.maximum(x, 0.0) + log)
  # Far below 0 softplus is exp, which underflows long before its root does.
  return jnp.where(x < -20.0, jnp.exp(0.5 * x), root)


def _pieces(stop: int, start: int = 0) -> list[pl.Slice]:
  """Returns slices of the experts that leave registers to spare."""
  return [pl.ds(at, min(64, stop - at)) for at in range(start, stop, 64)]


def _load(ref: jax.Ref, part: pl.Slice, **how: Any) -> jax.Array:
  """Loads the columns `part` of all 64 tokens."""
  return compat.load(ref, (slice(None), part), _TILE, **how)


def _score(
  logits: jax.Ref,
  kept: jax.Ref,
  bias: jax.Ref,
  biased: jax.Ref,
  scoring: str,
) -> None:
  """Stores scores of the logits to `kept`, and scores + bias to `biased`."""
  pieces = _pieces(bias.shape[0])
  fetch = functools.partial(_load, logits, optimized=False)
  softmax = scoring == 'softmax'
  top = total = None
  # Softmax needs the maximum over all pieces first.
  if softmax:
    top = functools.reduce(jnp.maximum, [fetch(p).max(axis=1) for p in pieces])
  # Scores: and for softmax their sum, over all pieces.
  for part in pieces:
    scores = _unnormalised(fetch(part), scoring, top)
    kept[:, part] = scores
    if softmax:
      own = scores.sum(axis=1)
      total = own if total is None else total + own
  # Choice: scores as the weights have them, plus the bias.
  for part in pieces:
    scores = _load(kept, part)
    if softmax:
      scores = scores / _wide(total, scores.shape)
      kept[:, part] = scores
    lift = compat.load(bias, part, _BY_EXPERT, optimized=False)
    choice = scores + lax.broadcast_in_dim(lift, scores.shape, [1])
    # A nan equals nothing, itself included; as the best it shows in a weight.
    biased[:, part] = jnp.where(choice != choice, jnp.inf, choice)


def _columns(part: pl.Slice) -> jax.Array:
  """Returns the expert number of each entry of a piece."""
  shape = (TOKENS, part.size)
  return part.start + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)


def _first(hit: jax.Array, column: jax.Array) -> jax.Array:
  """Returns per token the lowest column that is hit."""
  return jnp.where(hit, column, _NOWHERE).min(axis=1)


def _group_score(
  biased: jax.Ref, start: int, stop: int, group_score: str
) -> jax.Array:
  """Returns [tokens]: the best, or the best two, of experts start..stop-1."""
  best = second = compat.full((TOKENS,), -jnp.inf, _BY_TOKEN)
  for part in _pieces(-(-stop // 8) * 8, start // 8 * 8):
    choice, column = _load(biased, part), _columns(part)
    inside = (column >= start) & (column < stop)
    choice = jnp.where(inside, choice, -jnp.inf)
    top = choice.max(axis=1)
    if group_score == 'top2':
      first = _first(choice == _wide(top, choice.shape), column)
      other = jnp.where(column == _wide(first, choice.shape), -jnp.inf, choice)
      own = jnp.maximum(jnp.minimum(best, top), other.max(axis=1))
      second = jnp.maximum(second, own)
    best = jnp.maximum(best, top)
  if group_score == 'max':
    return best
  total = best + second
  return jnp.where(total != total, jnp.inf, total)  # inf - inf


def _limit_groups(biased: jax.Ref, E: int, rule: Rule) -> None:
  """Replaces the scores of all but the best groups by -inf."""
  size = E // rule.groups
  scores = [
    _group_score(biased, g * size, (g + 1) * size, rule.group_score)
    for g in range(rule.groups)
  ]
  ahead = []
  for g, own in enumerate(scores):
    # Groups that win against g: better, or as good and earlier.
    better = [
      (other >= own) if i < g else (other > own)
      for i, other in enumerate(scores)
      if i != g
    ]
    ahead.append(sum(b.astype(jnp.int32) for b in better))
  for part in _pieces(E):
    choice, column = _load(biased, part), _columns(part)
    for g in range(part.start // size, -(-(part.start + part.size) // size)):
      inside = (column >= g * size) & (column < (g + 1) * size)
      lost = _wide(ahead[g], choice.shape) >= rule.top_groups
      choice = jnp.where(lost & inside, -jnp.inf, choice)
    biased[:, part] = choice


def _next(
  biased: jax.Ref, E: int, value: jax.Array, index: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the best score after `value` of expert `index`, and its expert."""
  best = compat.full((TOKENS,), -jnp.inf, _BY_TOKEN)
  found = compat.full((TOKENS,), _NOWHERE, _BY_TOKEN, jnp.int32)
  for part in _pieces(E):
    choice, column = _load(biased, part), _columns(part)
    old = _wide(value, choice.shape)
    later = column > _wide(index, choice.shape)
    left = (choice < old) | ((choice == old) & later)
    top = jnp.where(left, choice, -jnp.inf).max(axis=1)
    first = _first(left & (choice == _wide(top, choice.shape)), column)
    # Of equals the lower, and any expert rather than none.
    better = (top > best) | ((top == best) & (first < found))
    best = jnp.where(better, top, best)
    found = jnp.where(better, first, found)
  return best, found


def _at(kept: jax.Ref, E: int, index: jax.Array) -> jax.Array:
  """Returns per token the kept score of expert `index`."""
  gain = compat.full((TOKENS,), 0.0, _BY_TOKEN)
  for part in _pieces(E):
    scores = _load(kept, part)
    chosen = _columns(part) == _wide(index, scores.shape)
    gain += jnp.where(chosen, scores, 0.0).sum(axis=1)
  return gain


def _count(picks: jax.Ref, counted: jax.Ref, tokens: int | jax.Array) -> None:
  """Counts how many of the first `tokens` tokens picked each expert."""
  for part in _pieces(counted.shape[0]):
    shape = (TOKENS, part.size)
    column = _columns(part)

    def one(
      k: jax.Array, hits: jax.Array, column: jax.Array = column
    ) -> jax.Array:
      own = compat.load(picks, k, _BY_TOKEN)
      hit = column == _wide(own, column.shape)
      return hits + jnp.where(hit, 1.0, 0.0)

    hits = compat.full(shape, 0.0, _TILE)
    hits = lax.fori_loop(0, picks.shape[0], one, hits)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
    counted[part] = jnp.where(row < tokens, hits, 0.0).sum(axis=0)


def _body(
  logits: jax.Ref, bias: jax.Ref, experts: jax.Ref, weights: jax.Ref,
  counts: jax.Ref, kept: jax.Ref, biased: jax.Ref, picks: jax.Ref,
  gains: jax.Ref, counted: jax.Ref, *, top_k: int, rule: Rule, tokens: int,
) -> None:  # fmt: skip
  """Routes 64 tokens."""
  block = lax.axis_index('block')
  E = bias.shape[0]
  own = logits.at[pl.ds(block * TOKENS, TOKENS)]
  # Scores: to shared memory, for the weights and for the choice.
  _score(own, kept, bias, biased, rule.scoring)
  if rule.groups > 1:
    _limit_groups(biased, E, rule)

  def pick(k: jax.Array, carry: tuple) -> tuple:
    # Choose: the next best expert in the order of (score, -number).
    value, index, total = carry
    value, index = _next(biased, E, value, index)
    gain = _at(kept, E, index)
    picks[k] = index
    gains[k] = gain
    return value, index, total + gain

  start = compat.full((TOKENS,), jnp.inf, _BY_TOKEN)
  before = compat.full((TOKENS,), -1, _BY_TOKEN, jnp.int32)
  zero = compat.full((TOKENS,), 0.0, _BY_TOKEN)
  _, _, total = lax.fori_loop(0, top_k, pick, (start, before, zero))
  # Weights: without the bias, over the sum of the chosen.
  norm = total + rule.eps if rule.normalize else jnp.ones_like(total)

  def rescale(k: jax.Array, _) -> tuple:
    gains[k] = compat.load(gains, k, _BY_TOKEN) / norm * rule.scale
    return ()

  lax.fori_loop(0, top_k, rescale, ())
  # Count: tokens past the end are padding.
  _count(picks, counted, tokens - block * TOKENS)
  # Store: choice first, token second, so that a row is one copy.
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(picks, experts.at[block])
  plgpu.copy_smem_to_gmem(gains, weights.at[block])
  plgpu.copy_smem_to_gmem(counted, counts.at[block])
  plgpu.wait_smem_to_gmem(0)
