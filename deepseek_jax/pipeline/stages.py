"""A model sharded into pipeline stages: which of its variables each holds.

Stages are even runs of layers, as the planner lays them. A stage keeps the
model's own form: whole patterns of a segment stay stacked and are scanned, and
only where a border cuts through a pattern do layers stand alone.
Legend: P stages.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deepseek_jax import trees
from deepseek_jax.errors import InputError
from deepseek_jax.model.functional import Functional, functional
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.network import Transformer
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.pipeline.cut import stage_places


class StagePiece(NamedTuple):
  """Names layers of a segment: a slice of its pattern and of its repeats."""

  segment: int
  pattern: slice
  repeats: slice


def pieces(config: TransformerConfig, first: int, end: int) -> tuple:
  """Returns layers first..end - 1 as the fewest Pieces, in order."""
  out, at = [], 0
  for i, (names, repeat) in enumerate(config.layout):
    n, before = len(names), at
    at += n * repeat
    a, b = max(first - before, 0), min(end, at) - before
    if a >= b:
      continue
    # Up to the first whole pattern, whole patterns, what is left of the last.
    whole = min(-(-a // n) * n, b)
    rest = max(b // n * n, whole)
    for start, stop in ((a, whole), (whole, rest), (rest, b)):
      if start == stop:
        continue
      r = start // n
      pattern = slice(start - r * n, min(stop - r * n, n))
      out.append(StagePiece(i, pattern, slice(r, -(-stop // n))))
  return tuple(out)


@dataclasses.dataclass(frozen=True)
class Stage:
  """Describes what one stage of a model holds.

  Attributes:
    config: of the whole model.
    pieces: its layers.
    first: it reads the tokens.
    last: it ends in the loss.
    embed: it holds the embedding: the first one does, and the last one where
      the head is tied or tokens further ahead are predicted.
  """

  config: TransformerConfig
  pieces: tuple[StagePiece, ...]
  first: bool
  last: bool
  embed: bool

  def make(self, key: jax.Array) -> Transformer:
    """Makes the module, under jax.eval_shape only, then drops what it lacks."""
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

  @property
  def abstract(self) -> dict[str, nnx.State]:
    """Returns the abstract variables that are the stage's own, no copies."""
    held = self.functional.abstract
    copied = {} if self.first else {'embed'}
    params = {k: v for k, v in held['params'].items() if k not in copied}
    return {**held, 'params': type(held['params'])(params)}

  def take(self, tree: dict) -> dict:
    """Takes this stage's shard of a tree of the whole model's variables.

    The embedding is the first stage's; where the last one needs it, too, that
    is a copy.
    """
    out = {
      k: v
      for k, v in tree.items()
      if k != 'segments' and (self.first if k == 'embed' else self.last)
    }
    for number, piece in enumerate(self.pieces):
      stacks = tree.get('segments', {}).get(piece.segment, {})
      # Without axes: the moment of a matrix of Muon's, which has none.
      found = {
        j - piece.pattern.start: jax.tree.map(
          lambda a, r=piece.repeats: a[r] if np.ndim(a) else a, stack
        )
        for j, stack in stacks.items()
        if piece.pattern.start <= j < piece.pattern.stop
      }
      if found:
        out.setdefault('segments', {})[number] = found
    return out

  def init(self, key: jax.Array) -> dict:
    """Returns the stage's variables: those of `Model.init`, and no others."""
    runs = [slice(0, 1)] * len(self.config.layout)  # of others, not computed
    for number in {piece.segment for piece in self.pieces}:
      own = [p.repeats for p in self.pieces if p.segment == number]
      runs[number] = slice(own[0].start, own[-1].stop)
    make = lambda key: Transformer(
      self.config, rngs=nnx.Rngs(key), repeats=tuple(runs)
    )
    first = tuple(run.start for run in runs)
    dtype = jnp.dtype(self.config.compute.products)
    made = functional(make, dtype, self.config.lora, first).init(key)
    less = lambda s, by: slice(s.start - by, s.stop - by)
    moved = [
      p._replace(repeats=less(p.repeats, runs[p.segment].start))
      for p in self.pieces
    ]
    part = dataclasses.replace(self, pieces=tuple(moved))
    return {kind: part.take(tree) for kind, tree in made.items()}

  @functools.cached_property
  def functional(self) -> Functional:
    """Returns the stage's module as pure functions."""
    dtype = jnp.dtype(self.config.compute.products)
    return functional(self.make, dtype, self.config.lora)


def cut(config: TransformerConfig, count: int) -> tuple[Stage, ...]:
  """Splits a model into `count` stages.

  Raises:
    InputError: there are fewer blocks than stages, or so few per stage that
      those of multi-token prediction would not all be with the head; or
      blocks have Engrams, whose rows only a whole model can number; or the
      embedding, which two stages may hold, is adapted.
  """
  if config.lora is not None and 'embed' in config.lora.names:
    raise InputError(
      f"mesh.stage = {count}: model.lora.names has 'embed', which stages cannot"
      ' adapt; leave it out or set mesh.stage to 1'
    )
  if any(b.engram for s in config.segments() for b in s.blocks):
    raise InputError(
      f'mesh.stage = {count}: a model with Engrams has no stages; set'
      ' it to 1 and another axis to that'
    )
  runs = stage_places(config, count)
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


def join(stages: tuple[Stage, ...], trees: Sequence[dict]) -> dict:
  """Joins the stages' shards of a tree to the whole model's.

  Args:
    stages: all of a model.
    trees: of each, in order; see `Stage.take`.

  Returns:
    NumPy arrays on the host, none of them a view of what was given.
  """
  out, stacks = {}, {}
  for stage, tree in zip(stages, trees):
    tree = jax.tree.map(np.array, jax.device_get(tree))
    out |= {k: v for k, v in tree.items() if k != 'segments'}
    for number, blocks in tree.get('segments', {}).items():
      piece = stage.pieces[number]
      for j, stack in blocks.items():
        place = piece.segment, piece.pattern.start + j
        stacks.setdefault(place, []).append(stack)
  one = lambda *a: np.concatenate(a) if a[0].ndim else a[0]
  for (i, j), parts in sorted(stacks.items()):
    whole = jax.tree.map(one, *parts)
    out.setdefault('segments', {}).setdefault(i, {})[j] = whole
  return out


def take_each(stage: Stage, tree: Any) -> Any:
  """Applies `stage.take` to every tree of variables in a tree, e.g. moments."""
  one = lambda x: stage.take(x) if isinstance(x, dict) else x
  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, dict))


def join_each(stages: tuple[Stage, ...], trees: Sequence[Any]) -> Any:
  """Inverts `take_each`, on the host; what is no tree is the first stage's."""

  def one(*parts: Any) -> Any:
    if isinstance(parts[0], dict):
      return join(stages, parts)
    return np.array(parts[0])

  return jax.tree.map(one, *trees, is_leaf=lambda x: isinstance(x, dict))


def nested(flat: dict, mark: str) -> dict:
  """Nests a flat dict: {'segments/0/1': x} -> {'segments': {0: {1: x}}}."""
  key = lambda k: int(k) if k.isdigit() else k
  return trees.nested(
    (map(key, path.split(mark)), value) for path, value in flat.items()
  )


def flat(tree: dict, mark: str) -> dict:
  """Flattens a nested dict, the inverse of `nested`."""
  out = {}
  for key, value in tree.items():
    if not isinstance(value, dict):
      out[str(key)] = value
      continue
    inner = flat(value, mark)
    out |= {f'{key}{mark}{path}': leaf for path, leaf in inner.items()}
  return out
