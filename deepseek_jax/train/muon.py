"""Computes Muon's updates as in DeepSeek-V4 (algorithm 1, section 2.4).

A matrix is updated by its momentum made orthogonal: M <- beta M + G,
O <- NewtonSchulz(beta M + G), W <- W - rate (0.18 sqrt(max(n, m)) O + decay W),
so that the update's root mean square is 0.18. Every logically independent
matrix is taken by itself: each expert, gate and up, each series of a
compressor, each group of the output projection; also each stream's key of an
n-gram memory and each branch of native sparse attention. AdamW has the rest:
embedding, head, norm weights, biases and scales, sinks, the compressors'
position biases (the paper is silent on the last two; both are added, not
multiplied), rows of n-gram tables, which don't decay.
Legend: L stacked layers, n inputs, m outputs.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax import trees
from deepseek_jax.config import above, at_least, within
from deepseek_jax.model import matrices
from deepseek_jax.model.matrices import Split
from deepseek_jax.train.gradient_norms import gain

# Of a round that drives all singular values near 1, and of one that settles
# them there.
_DRIVE, _SETTLE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)


@dataclasses.dataclass(frozen=True)
class MuonConfig:
  """Describes the update of the matrices.

  Attributes:
    momentum: beta.
    rms: root mean square of an update at a learning rate of 1.
    decay: of the matrices.
    vectors: whether AdamW's decay applies to vectors too, as V4's text has it;
      else only embedding and head decay.
    rounds, settling: of Newton-Schulz: those that drive singular values near 1,
      and those that settle them there (V4: 8 and 2; Muon as it was: 5 and 0).
  """

  momentum: float = 0.95
  rms: float = 0.18
  decay: float = 0.1
  vectors: bool = True
  rounds: int = 8
  settling: int = 2

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    within(self, 'muon.', momentum=(0, 1), ends='[)')
    above(self, 'muon.', rms=0)
    at_least(self, 'muon.', decay=0, rounds=1, settling=0)

  def coefficients(self) -> tuple[tuple[float, float, float], ...]:
    """Returns (a, b, c) of every round, see `newton_schulz`."""
    return self.rounds * (_DRIVE,) + self.settling * (_SETTLE,)


def split(axes: tuple) -> Split | None:
  """Returns how a parameter is made of matrices; None: AdamW has it."""
  return None if 'vocab' in axes else matrices.split(axes)


def newton_schulz(
  x: jax.Array,
  coefficients: tuple[tuple[float, float, float], ...] = (
    MuonConfig().coefficients()
  ),
) -> jax.Array:
  """Returns the nearly orthogonal matrices closest to x [... n m], float32.

  With V4's ten rounds their singular values become 1 within 0.0005, unless they
  are tiny beside the largest. A matrix of zeros stays one, and one without a
  normal number becomes one: a momentum that decays for long ends there.

  Args:
    x: the matrices.
    coefficients: (a, b, c) of each round: x <- a x + (b G + c G^2) x, where
      G = x x^T.
  """
  x = x.astype(jnp.float32)
  tall = x.shape[-2] > x.shape[-1]
  # The Gram matrix below is that of the shorter side.
  x = jnp.swapaxes(x, -1, -2) if tall else x
  # By the largest number first: squares underflow below 1e-20.
  x = x * gain(jnp.abs(x).max(axis=(-2, -1), keepdims=True))
  norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))

  def once(x: jax.Array, abc: jax.Array) -> tuple[jax.Array, None]:
    """Moves the singular values towards 1: a x + (b G + c G^2) x, G = x x^T."""
    a, b, c = abc
    gram = x @ jnp.swapaxes(x, -1, -2)
    return a * x + (b * gram + c * gram @ gram) @ x, None

  x = x / jnp.where(norm > 0, norm, 1.0)
  x, _ = jax.lax.scan(once, x, jnp.asarray(coefficients, jnp.float32))
  return jnp.swapaxes(x, -1, -2) if tall else x


def orthogonal(x: jax.Array, how: Split, cfg: MuonConfig) -> jax.Array:
  """Returns a parameter with every matrix (stacked layers first) orthogonal.

  Each is scaled by sqrt(max(n, m)): its root mean square becomes 1.
  """
  stack = x.ndim - sum(map(len, how))
  # Axes in the order [layers, independent, inputs, outputs].
  order = [*how.independent, *how.inputs, *how.outputs]
  order = [*range(stack), *(stack + i for i in order)]
  size = lambda group: math.prod(x.shape[stack + i] for i in group)
  n, m = size(how.inputs), size(how.outputs)
  transposed = x.transpose(order)
  # [matrices n m], all at once.
  flat = newton_schulz(transposed.reshape(-1, n, m), cfg.coefficients())
  flat = flat * math.sqrt(max(n, m))
  return flat.reshape(transposed.shape).transpose(
    sorted(range(x.ndim), key=order.__getitem__)
  )


class MuonState(NamedTuple):
  """Holds the momenta; `second` is AdamW's, and a single zero for a matrix."""

  count: jax.Array
  first: Any
  second: Any


def splits(abstract: nnx.State) -> dict:
  """Returns the Split of each parameter, or None, nested like them."""
  leaf = lambda v: isinstance(v, nnx.Variable)
  axes = lambda variable: tuple(variable.get_metadata()['axes'])
  return trees.nested(
    ([entry.key for entry in path], split(axes(variable)))
    for path, variable in jax.tree.leaves_with_path(abstract, is_leaf=leaf)
  )


def scale_by_muon(
  cfg: MuonConfig, adam: tuple[float, float, float], how: dict
) -> optax.GradientTransformation:
  """Returns the update direction without decay and sign, in float32.

  Args:
    cfg: of the matrices.
    adam: beta1, beta2 and eps of the rest.
    how: see `splits`.
  """
  beta1, beta2, eps = adam
  is_split = lambda s: s is None or isinstance(s, Split)
  each = lambda f, *trees: jax.tree.map(f, how, *trees, is_leaf=is_split)

  def init(params: Any) -> MuonState:
    first = jax.tree.map(jnp.zeros_like, params)
    second = each(lambda s, p: jnp.zeros(() if s else p.shape, p.dtype), params)
    return MuonState(jnp.zeros((), jnp.int32), first, second)

  def update(
    grads: Any, state: MuonState, params: Any = None
  ) -> tuple[Any, MuonState]:
    del params
    count = state.count + 1

    def one(
      s: Split | None, g: jax.Array, m: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
      g = g.astype(jnp.float32)
      if s:
        # Nesterov momentum, then the nearest orthogonal matrix.
        m = cfg.momentum * m + g
        ahead = cfg.momentum * m + g
        return cfg.rms * orthogonal(ahead, s, cfg), m, v
      # Adam, with bias correction.
      m = beta1 * m + (1 - beta1) * g
      v = beta2 * v + (1 - beta2) * g * g
      t = count.astype(jnp.float32)
      root = jnp.sqrt(v / (1 - beta2**t))
      # With V4's eps of 1e-20 a parameter of no gradient would give 0 / 0.
      root = jnp.where(v > 0, root + eps, 1.0)
      return m / (1 - beta1**t) / root, m, v

    out = each(one, grads, state.first, state.second)
    pick = lambda i: each(lambda s, o: o[i], out)
    return pick(0), MuonState(count, pick(1), pick(2))

  return optax.GradientTransformation(init, update)
