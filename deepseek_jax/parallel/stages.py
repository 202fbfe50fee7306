"""A model cut into pipeline stages: which variables each holds, what each does.

Stages are even runs of layers, as the planner lays them. A stage keeps the
model's own form: whole patterns of a segment stay stacked and are scanned, and
only where a border cuts through a pattern do layers stand alone.
Legend: P stages, B sequences, T tokens, D model.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax.errors import InputError
from deepseek_jax.layers.context import Context
from deepseek_jax.layers.mtp import MTPConfig
from deepseek_jax.plan import mesh as meshes
from deepseek_jax.train import (
  Shares,
  attention_losses,
  routing_losses,
  targets,
  token_losses,
)
from deepseek_jax.transformer import (
  Functional,
  Transformer,
  TransformerConfig,
  functional,
)


class Piece(NamedTuple):
  """Layers of one segment: a slice of its pattern, a slice of its repeats."""

  segment: int
  pattern: slice
  repeats: slice


def pieces(config: TransformerConfig, first: int, end: int) -> tuple:
  """Layers first..end - 1 as the fewest Pieces, in order."""
  out, at = [], 0
  for i, (names, repeat) in enumerate(config.layout):
    n, before = len(names), at
    at += n * repeat
    a, b = max(first - before, 0), min(end, at) - before
    if a >= b:
      continue
    whole = min(-(-a // n) * n, b)
    rest = max(b // n * n, whole)
    for start, stop in ((a, whole), (whole, rest), (rest, b)):
      if start == stop:
        continue
      r = start // n
      pattern = slice(start - r * n, min(stop - r * n, n))
      out.append(Piece(i, pattern, slice(r, -(-stop // n))))
  return tuple(out)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What one stage of a model holds.

  Attributes:
    config: of the whole model.
    pieces: its layers.
    first: it reads the tokens.
    last: it ends in the loss.
    embed: it holds the embedding: the first one does, and the last one where
      the head is tied or tokens further ahead are predicted.
  """

  config: TransformerConfig
  pieces: tuple[Piece, ...]
  first: bool
  last: bool
  embed: bool

  def make(self, key) -> Transformer:
    """The module; made under jax.eval_shape only, then cut to what it holds."""
    names = [n for n, _ in self.config.layout]
    layout = tuple(
      (names[p.segment][p.pattern], p.repeats.stop - p.repeats.start)
      for p in self.pieces
    )
    change = {'layout': layout or self.config.layout}
    if not self.last:
      change['mtp'] = MTPConfig(0)
    made = Transformer(
      dataclasses.replace(self.config, **change), rngs=nnx.Rngs(key)
    )
    if not layout:
      made.segments = nnx.List([])
    drop = [] if self.embed else ['embed']
    drop += [] if self.last else ['norm', 'residual', 'head']
    for name in drop:
      if hasattr(made, name):
        delattr(made, name)
    return made

  def take(self, tree: dict) -> dict:
    """This stage's part of a tree of the whole model's variables."""
    out = {
      k: v
      for k, v in tree.items()
      if k != 'segments' and (self.embed if k == 'embed' else self.last)
    }
    for number, piece in enumerate(self.pieces):
      stacks = tree.get('segments', {}).get(piece.segment, {})
      found = {
        j - piece.pattern.start: jax.tree.map(
          lambda a, r=piece.repeats: a[r], stack
        )
        for j, stack in stacks.items()
        if piece.pattern.start <= j < piece.pattern.stop
      }
      if found:
        out.setdefault('segments', {})[number] = found
    return out

  @functools.cached_property
  def functional(self) -> Functional:
    """The stage's module as pure functions."""
    return functional(self.make, jnp.dtype(self.config.compute.dtype))

  def __call__(
    self, params, stream, buffers, batch, shares: Shares, cross_document: bool
  ):
    """What the stage computes, for jax.vjp.

    Args:
      params: in the compute dtype, from `functional.cast`.
      stream: [B T ...] of the stage before; None for the first.
      buffers: its own.
      batch: as in `loss_and_metrics`; of one micro-batch.
      shares: how it counts.
      cross_document: documents see each other.

    Returns:
      ((stream, loss), metrics): the stream is None for the last stage; the
      loss is this stage's share of the global batch's, and the metrics are
      those of `loss_and_metrics` that the stage knows.
    """
    module = self.functional.merge({'params': params, 'buffers': buffers})
    tokens, segments, positions, *wanted = targets(batch, cross_document)
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    ctx = Context(tokens, positions, segments, train=True)
    stream = module.enter(ctx) if self.first else stream
    stream, _, statistics = module.through(stream, ctx, None)
    aux, loss, metrics = {'segments': statistics}, jnp.float32(0), {}
    if self.last:
      hidden, ahead = module.leave(stream, ctx, mtp=True)
      aux, stream = aux | ahead, None
      loss, metrics = token_losses(
        hidden, aux, module.head_weight(), wanted, shares
      )
    for losses in (routing_losses, attention_losses):
      extra, more = losses(aux, shares)
      loss, metrics = loss + extra, metrics | more
    if 'recall' in metrics:  # a mean over layers; stages add up
      layers = _sparse_layers(aux) / shares.micro_batches
      metrics |= {
        'recall': metrics['recall'] * layers * shares.micro_batches,
        'sparse_layers': layers,
      }
    return (stream, loss), metrics


def _sparse_layers(aux: dict) -> int:
  blocks = [s for patterns in aux['segments'] for s in patterns]
  seen = [s['attention'] for s in [*blocks, *aux.get('mtp', [])]]
  return sum(s['recall'].size for s in seen if 'recall' in s)


def cut(config: TransformerConfig, count: int) -> tuple[Stage, ...]:
  """A model as `count` stages.

  Raises:
    InputError: there are fewer blocks than stages, or so few per stage that
      those of multi-token prediction would not all be with the head; or
      blocks have memories, whose rows only a whole model can number.
  """
  if any(b.engram for s in config.segments() for b in s.blocks):
    raise InputError(
      f'mesh.stage = {count}: a model with memories (engram) has no stages'
    )
  runs = meshes.stages(config, meshes.Mesh(stage=count))
  out = []
  for number, places in enumerate(runs):
    last = number == count - 1
    if not last and any(p[0] == 'mtp' for p in places):
      raise InputError(
        f'mesh.stage = {count}: splits the {config.mtp.depth} blocks of'
        ' multi-token prediction; use fewer stages'
      )
    layers = [p[1] for p in places if p[0] == 'block']
    held = pieces(config, layers[0], layers[-1] + 1) if layers else ()
    out.append(Stage(config, held, number == 0, last, ('start',) in places))
  return tuple(out)


def join(stages: tuple[Stage, ...], trees, add: bool) -> dict:
  """Stages' parts of a tree as the whole model's, NumPy arrays on the host.

  Args:
    stages: all of a model.
    trees: of each, in order.
    add: what several stages hold (the embedding) is added up, as gradients
      are; else it is the first one's.
  """
  out, stacks = {}, {}
  for stage, tree in zip(stages, trees):
    tree = jax.device_get(tree)
    for key, value in tree.items():
      if key == 'segments':
        continue
      if key not in out:
        out[key] = value
      elif add:
        out[key] = jax.tree.map(np.add, out[key], value)
    for number, blocks in tree.get('segments', {}).items():
      piece = stage.pieces[number]
      for j, stack in blocks.items():
        place = piece.segment, piece.pattern.start + j
        stacks.setdefault(place, []).append(stack)
  for (i, j), parts in sorted(stacks.items()):
    whole = jax.tree.map(lambda *a: np.concatenate(a), *parts)
    out.setdefault('segments', {}).setdefault(i, {})[j] = whole
  return out
