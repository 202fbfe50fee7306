"""Measures routing while training, beyond the load of each expert.

Three questions: how sure is the gate (the entropy of its scores), how much of
the choice is the selection bias's rather than the scores' (DeepSeek-V3,
arXiv:2412.19437, section 2.1.2, adds it to the choice alone), and which experts
are chosen together. All are sums over tokens, so that micro-batches add up.
Legend: B batch, T tokens, E experts, K chosen, G groups of neighbours.
"""

import jax
import jax.numpy as jnp

from deepseek_jax.model.experts.router import (
  RouterConfig,
  Routing,
  choose,
  shares,
)
from deepseek_jax.record.metric import Metric

METRICS = {
  'entropy': Metric('Gate entropy', 'of a uniform choice', per='layer'),
  'moved': Metric('Moved by the bias', 'share of tokens', per='layer'),
  'together': Metric('Chosen together', 'pairs', per='layer', over='sum'),
}
_GROUPS = 64  # counted pairs are at most so many squared


def statistics(
  routing: Routing, bias: jax.Array | None, cfg: RouterConfig
) -> dict[str, jax.Array]:
  """Sums statistics over the valid tokens of a batch.

  Args:
    routing: as the router gave it, before anything is dropped.
    bias: [E] that moved the choice, or None.
    cfg: of the router.

  Returns:
    'entropy': [] float32, the entropy of the scores, made to add up to 1, over
      log E; 'moved': [] int32, tokens of which the bias changed the choice;
    'together': [G G] int32, how often a token chose an expert of one group and
      one of another; G is E, or its largest divisor up to 64. Within a group
      also each expert with itself.
  """
  E = routing.scores.shape[-1]
  scores = jax.lax.stop_gradient(routing.scores)
  hit = _hits(routing.experts, E)  # [B T E]
  # Padding chooses number E, which hits nothing.
  valid = hit.any(axis=-1)
  return {
    'entropy': jnp.where(valid, entropy(scores), 0.0).sum(),
    'moved': (_moved(hit, routing, bias, cfg) & valid).sum(),
    'together': _together(hit),
  }


def entropy(scores: jax.Array) -> jax.Array:
  """Computes the entropy of non-negative scores [... E] over log E: [...].

  1 is uniform.
  """
  share = shares(scores)
  terms = share * jnp.log(jnp.where(share > 0, share, 1.0))
  return -terms.sum(axis=-1) / jnp.log(max(scores.shape[-1], 2))


def groups(experts: int) -> int:
  """Returns how many groups of neighbours pairs are counted of."""
  return max(g for g in range(1, _GROUPS + 1) if experts % g == 0)


def _hits(experts: jax.Array, E: int) -> jax.Array:
  """Returns whether each expert is chosen: [... K] -> [... E] bool."""
  return (experts[..., None] == jnp.arange(E)).any(axis=-2)


def _moved(
  hit: jax.Array, routing: Routing, bias: jax.Array | None, cfg: RouterConfig
) -> jax.Array:
  """Returns which tokens choose otherwise without the bias, [B T] bool."""
  if bias is None:
    return jnp.zeros(hit.shape[:-1], bool)
  K = routing.experts.shape[-1]
  alone, _ = choose(routing.scores, None, K, cfg)
  return (_hits(alone, hit.shape[-1]) != hit).any(axis=-1)


def _together(hit: jax.Array) -> jax.Array:
  """Counts the pairs of groups that tokens choose, [G G] int32."""
  E = hit.shape[-1]
  G = groups(E)
  # B and T stay apart: both may be sharded.
  grouped = hit.reshape(*hit.shape[:2], G, E // G)
  grouped = grouped.sum(axis=-1, dtype=jnp.int8)
  return jnp.einsum(
    'BTG,BTH->GH', grouped, grouped, preferred_element_type=jnp.int32
  )
