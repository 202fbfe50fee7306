"""Scores, groups, bias, top-k and weights in XLA."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Rule:
  """Sets how experts are chosen and weighted.

  Attributes:
    scoring: affinity of a token to an expert.
    groups: experts lie in this many groups of neighbours ...
    top_groups: ... of which a token may use this many.
    group_score: a group counts by its best expert or by its best two.
    normalize: the chosen weights are divided by their sum + eps.
    scale: multiplies the weights.
    eps: as in V3's released code.
  """

  scoring: Literal['softmax', 'sigmoid', 'sqrtsoftplus'] = 'sigmoid'
  groups: int = 1
  top_groups: int = 1
  group_score: Literal['max', 'top2'] = 'top2'
  normalize: bool = True
  scale: float = 1.0
  eps: float = 1e-20


def score(logits: jax.Array, scoring: str) -> jax.Array:
  """Returns affinities [N E] of float32 logits [N E]."""
  if scoring == 'softmax':
    return jax.nn.softmax(logits, axis=-1)
  if scoring == 'sigmoid':
    return jax.nn.sigmoid(logits)
  # Far below 0 softplus is exp, whose root stays differentiable in float32.
  low = logits < -20
  root = jnp.sqrt(jax.nn.softplus(jnp.where(low, 0.0, logits)))
  return jnp.where(low, jnp.exp(jnp.where(low, logits, 0.0) / 2), root)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def normalized(weights: jax.Array, eps: float) -> jax.Array:
  """Returns weights [... K] over their sum + eps."""
  return weights / (weights.sum(axis=-1, keepdims=True) + eps)


@normalized.defjvp
def _normalized_jvp(eps: float, primals: tuple, tangents: tuple) -> tuple:
  """Returns the weights and their change."""
  # The rule of a quotient squares the sum, which leaves float32 near eps.
  (weights,), (change,) = primals, tangents
  total = weights.sum(axis=-1, keepdims=True) + eps
  out = weights / total
  return out, (change - out * change.sum(axis=-1, keepdims=True)) / total


def limit_groups(choice: jax.Array, rule: Rule) -> jax.Array:
  """Returns choice [N E] with all but the best groups at -inf."""
  N, E = choice.shape
  grouped = choice.reshape(N, rule.groups, E // rule.groups)
  best = 1 if rule.group_score == 'max' else 2
  rank = jax.lax.top_k(grouped, best)[0].sum(-1)  # [N G]
  chosen = jax.lax.top_k(rank, rule.top_groups)[1]
  keep = (chosen[..., None] == jnp.arange(rule.groups)).any(1)
  return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(N, E)


def choose(
  logits: jax.Array, bias: jax.Array | None, top_k: int, rule: Rule
) -> jax.Array:
  """Returns experts int32 [N K]; the lower number wins ties."""
  choice = score(logits.astype(jnp.float32), rule.scoring)
  if bias is not None:
    choice = choice + bias
  if rule.groups > 1:
    choice = limit_groups(choice, rule)
  return jax.lax.top_k(choice, top_k)[1].astype(jnp.int32)


def weigh(logits: jax.Array, experts: jax.Array, rule: Rule) -> jax.Array:
  """Returns float32 weights [N K] of chosen experts, differentiable."""
  scores = score(logits.astype(jnp.float32), rule.scoring)
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if rule.normalize:
    weights = normalized(weights, rule.eps)
  return weights * rule.scale


def route(
  logits: jax.Array, bias: jax.Array | None, top_k: int, rule: Rule
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns experts [N K], weights [N K] and counts [E]."""
  experts = choose(logits, bias, top_k, rule)
  counts = jnp.bincount(experts.reshape(-1), length=logits.shape[1])
  return experts, weigh(logits, experts, rule), counts.astype(jnp.int32)
