"""Routing on Hopper: 64 tokens per warpgroup, all their scores in registers.

The layout of a wgmma accumulator gives each token to four threads, so a
maximum over experts is a few shuffles. The K best are found by K rounds of
maximum, lowest index of that maximum, and -inf in its place.
"""

import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat

TOKENS = 64
_TILE = plgpu.Layout.WGMMA
_BY_TOKEN = plgpu.Layout.WGMMA.reduce(1)
_BY_EXPERT = plgpu.Layout.WGMMA.reduce(0)


def route(logits, bias, top_k, rule):
  N, E = logits.shape
  if logits.dtype != jnp.float32:
    raise NotImplementedError(f'logits are {logits.dtype}, not float32')
  if E % 8 or E > 256:
    raise NotImplementedError(f'{E} experts, not a multiple of 8 up to 256')
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
      'kept': plgpu.SMEM((TOKENS, E), jnp.float32),
      'biased': plgpu.SMEM((TOKENS, E), jnp.float32),
      'picks': plgpu.SMEM((top_k, TOKENS), jnp.int32),
      'gains': plgpu.SMEM((top_k, TOKENS), jnp.float32),
      'counted': plgpu.SMEM((E,), jnp.float32),
      'here': plgpu.Barrier(),
    },
  )(padded, bias)
  turn = lambda a: a.swapaxes(1, 2).reshape(-1, top_k)[:N]
  # Each block has counted its own: no atomics, the same bits in every run.
  return turn(experts), turn(weights), counts.astype(jnp.int32).sum(axis=0)


def _wide(values, shape):
  return lax.broadcast_in_dim(values, shape, [0])


def _unnormalised(x, scoring, top):
  """Scores of logits x; for softmax without the division by their sum."""
  if scoring == 'sigmoid':
    return 1.0 / (1.0 + jnp.exp(-x))
  if scoring == 'softmax':
    return jnp.exp(x - _wide(top, x.shape))
  small = jnp.exp(-jnp.abs(x))
  # log(1 + small) loses small below 1e-3 or so; its series does not.
  series = small * (1.0 - small * (0.5 - small * (1.0 / 3.0)))
  log = jnp.where(small < 1e-2, series, jnp.log(1.0 + small))
  return compat.sqrt(jnp.maximum(x, 0.0) + log)


def _pieces(E):
  """Slices of the experts, small enough to leave registers to spare."""
  width = 64 if E % 64 == 0 else E
  return [pl.ds(start, width) for start in range(0, E, width)]


def _score(kept, bias, biased, scoring):
  """Logits in `kept` become scores there, and scores + bias in `biased`."""
  every = slice(None)
  pieces = _pieces(kept.shape[1])
  read = lambda part: compat.load(kept, (every, part), _TILE)
  softmax = scoring == 'softmax'
  top = total = None
  if softmax:
    top = functools.reduce(jnp.maximum, [read(p).max(axis=1) for p in pieces])
  for part in pieces:
    scores = _unnormalised(read(part), scoring, top)
    kept[:, part] = scores
    if softmax:
      own = scores.sum(axis=1)
      total = own if total is None else total + own
  for part in pieces:
    scores = read(part)
    if softmax:
      scores = scores / _wide(total, scores.shape)
      kept[:, part] = scores
    lift = compat.load(bias, part, _BY_EXPERT, optimized=False)
    biased[:, part] = scores + lax.broadcast_in_dim(lift, scores.shape, [1])


def _first(values, top, column):
  """Per token the lowest column whose value is `top`."""
  hit = values == _wide(top, values.shape)
  return jnp.where(hit, column, jnp.int32(2**30)).min(axis=1)


def _columns(shape):
  return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_TILE)


def _group(choice, g, size):
  """The scores of group g, alone or with -inf around them, and the columns."""
  if size % 8 == 0:
    part = lax.slice(choice, (0, g * size), (TOKENS, (g + 1) * size))
    return part, _columns(part.shape)
  column = _columns(choice.shape)
  inside = (column >= g * size) & (column < (g + 1) * size)
  return jnp.where(inside, choice, -jnp.inf), column


def _group_score(choice, g, rule):
  """[tokens], the sum of the best or the best two of group g."""
  part, column = _group(choice, g, choice.shape[1] // rule.groups)
  best = part.max(axis=1)
  if rule.group_score == 'max':
    return best
  first = _wide(_first(part, best, column), part.shape)
  return best + jnp.where(column == first, -jnp.inf, part).max(axis=1)


def _limit_groups(choice, rule):
  scores = [_group_score(choice, g, rule) for g in range(rule.groups)]
  size = choice.shape[1] // rule.groups
  column = _columns(choice.shape)
  for g, own in enumerate(scores):
    # Groups that win against g: better, or as good and earlier.
    better = [
      (other >= own) if i < g else (other > own)
      for i, other in enumerate(scores)
      if i != g
    ]
    ahead = sum(b.astype(jnp.int32) for b in better)
    lost = _wide(ahead, choice.shape) >= rule.top_groups
    inside = (column >= g * size) & (column < (g + 1) * size)
    choice = jnp.where(lost & inside, -jnp.inf, choice)
  return choice


def _at(kept, index):
  """Per token the kept score of expert `index`.

  From shared memory and in pieces: two [tokens, experts] don't fit the
  registers.
  """
  gain = compat.full((TOKENS,), 0.0, _BY_TOKEN)
  for part in _pieces(kept.shape[1]):
    scores = compat.load(kept, (slice(None), part), _TILE)
    chosen = _columns(scores.shape) == _wide(index - part.start, scores.shape)
    gain += jnp.where(chosen, scores, 0.0).sum(axis=1)
  return gain


def _count(picks, counted, tokens):
  """How many of the first `tokens` picked each expert."""
  for part in _pieces(counted.shape[0]):
    shape = (TOKENS, part.size)
    column = _columns(shape)

    def one(k, hits, part=part, column=column):
      own = compat.load(picks, k, _BY_TOKEN) - part.start
      hit = column == _wide(own, column.shape)
      return hits + jnp.where(hit, 1.0, 0.0)

    hits = compat.full(shape, 0.0, _TILE)
    hits = lax.fori_loop(0, picks.shape[0], one, hits)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_TILE)
    counted[part] = jnp.where(row < tokens, hits, 0.0).sum(axis=0)


def _body(
  logits,
  bias,
  experts,
  weights,
  counts,
  kept,
  biased,
  picks,
  gains,
  counted,
  here,
  *,
  top_k,
  rule,
  tokens,
):
  block = lax.axis_index('block')
  own = pl.ds(block * TOKENS, TOKENS)
  plgpu.copy_gmem_to_smem(logits.at[own], kept, here)
  plgpu.barrier_wait(here)
  every = slice(None)
  _score(kept, bias, biased, rule.scoring)
  choice = compat.load(biased, every, _TILE)
  if rule.groups > 1:
    choice = _limit_groups(choice, rule)
  column = _columns(choice.shape)

  def pick(k, carry):
    choice, total = carry
    index = _first(choice, choice.max(axis=1), column)
    chosen = column == _wide(index, choice.shape)
    gain = _at(kept, index)
    picks[k] = index
    gains[k] = gain
    return jnp.where(chosen, -jnp.inf, choice), total + gain

  zero = compat.full((TOKENS,), 0.0, _BY_TOKEN)
  _, total = lax.fori_loop(0, top_k, pick, (choice, zero))
  norm = total + 1e-20 if rule.normalize else jnp.ones_like(total)

  def rescale(k, _):
    gains[k] = compat.load(gains, k, _BY_TOKEN) / norm * rule.scale
    return ()

  lax.fori_loop(0, top_k, rescale, ())
  _count(picks, counted, tokens - block * TOKENS)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(picks, experts.at[block])
  plgpu.copy_smem_to_gmem(gains, weights.at[block])
  plgpu.copy_smem_to_gmem(counted, counts.at[block])
  plgpu.wait_smem_to_gmem(0)
