"""Computes the objective of GRPO for each token, and its sum over answers.

R1's objective (arXiv:2501.12948) and V3.2's (arXiv:2512.02556, section 3.1)
are settings of one formula, as are DAPO's and Dr. GRPO's. All functions are
pure and keep the dtype that they are given.
Legend: B rows, T tokens, N answers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class PolicyTokens(NamedTuple):
  """Holds what is known of sampled tokens, each array [B T].

  Where `mask` is 0 (prompt, tool output, padding) the others may be anything.
  """

  policy: jax.Array  # log-probs under the weights that learn; differentiated
  old: jax.Array  # under the weights at rollout
  sampler: jax.Array  # as the sampler returned them; NaN where it did not
  reference: jax.Array | None  # under the reference; None without a KL term
  advantages: jax.Array
  mask: jax.Array  # 1 on tokens that learn
  answers: jax.Array  # int32 number of the answer in its row, 0..T; 0: none


class Terms(NamedTuple):
  """Holds the objective of each token [B T], to be maximised, and statistics.

  Attributes:
    objective: M * surrogate - beta * KL.
    statistics: name -> [B T], without a gradient.
  """

  objective: jax.Array
  statistics: dict[str, jax.Array]


def answer_sums(values: jax.Array, answers: jax.Array) -> jax.Array:
  """Returns [B T]: for each token the sum of `values` over its answer."""
  most = answers.shape[1] + 1

  def one(values: jax.Array, answers: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(values, answers, most)[answers]

  return jax.vmap(one)(values, answers)


def answer_means(
  values: jax.Array, mask: jax.Array, answers: jax.Array
) -> jax.Array:
  """Returns [B T]: for each token the mean of its answer's masked values."""
  count = answer_sums(mask, answers)
  total = answer_sums(jnp.where(mask > 0, values, 0) * mask, answers)
  return total / jnp.where(count > 0, count, 1)


def terms(cfg: Any, tokens: PolicyTokens) -> Terms:
  """Returns what every token adds to the objective.

  Args:
    cfg: a GRPOConfig.
    tokens: of a batch; answers lie whole in their rows.
  """
  on = tokens.mask > 0
  still = jax.lax.stop_gradient
  # Tokens that do not learn: every difference is 0, so nothing overflows.
  only = lambda x: jnp.where(on, x, 0)
  policy, advantages = only(tokens.policy), only(tokens.advantages)
  old = only(tokens.old)
  log_ratio, limited = _limited(policy - old, cfg.log_ratio_limit)
  if cfg.ratio == 'sequence':  # GSPO: one ratio for all tokens of an answer
    log_ratio = answer_means(log_ratio, tokens.mask, tokens.answers)
  ratio = jnp.exp(log_ratio)
  surrogate, clips = _surrogate(cfg, ratio, policy, advantages)
  kept = _kept(cfg, tokens, policy, advantages)
  objective, kl = kept * surrogate, None
  if cfg.kl != 'none':
    log_ratio_ref, far = _limited(
      only(tokens.reference) - policy, cfg.log_ratio_limit
    )
    limited |= far
    kl = divergence(cfg.kl, log_ratio_ref, ratio)
    objective -= cfg.kl_weight * kl
  heard = on & ~jnp.isnan(tokens.sampler)
  gap = jnp.abs(jnp.where(heard, tokens.sampler - tokens.old, 0))
  statistics = {
    'ratio': ratio,
    'mismatch': gap,
    'kept': kept * jnp.ones_like(ratio),
    'limited': limited,
    **clips,
  }
  if kl is not None:
    statistics['kl'] = divergence('k3', log_ratio_ref, ratio)
  as_float = lambda x: still(only(x.astype(objective.dtype)))
  return Terms(only(objective), jax.tree.map(as_float, statistics))


def _limited(log_ratio: jax.Array, most: float) -> tuple[jax.Array, jax.Array]:
  """Returns log-ratios clipped to +-most, and which were.

  Those have no gradient.
  """
  return jnp.clip(log_ratio, -most, most), jnp.abs(log_ratio) > most


def _surrogate(
  cfg: Any, ratio: jax.Array, policy: jax.Array, advantages: jax.Array
) -> tuple[jax.Array, dict]:
  """Returns the policy term [B T], and which tokens were clipped."""
  low = 0.0 if cfg.clip_low is None else 1 - cfg.clip_low
  high = jnp.inf if cfg.clip_high is None else 1 + cfg.clip_high
  clips = {
    'clipped_low': (ratio < low) & (advantages < 0),
    'clipped_high': (ratio > high) & (advantages > 0),
  }
  if cfg.surrogate == 'cispo':
    # The clipped ratio is a weight: every token keeps its gradient.
    weight = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
    return weight * advantages * policy, clips
  value = ratio * advantages
  if cfg.clip_low is not None or cfg.clip_high is not None:
    value = jnp.minimum(value, jnp.clip(ratio, low, high) * advantages)
  if cfg.dual_clip is None:
    return value, clips
  # A far too likely token of a bad answer stops at a bound of its own.
  bound = cfg.dual_clip * advantages
  clips['clipped_dual'] = (advantages < 0) & (ratio > cfg.dual_clip)
  return jnp.where(clips['clipped_dual'], bound, value), clips


def _kept(
  cfg: Any, tokens: PolicyTokens, policy: jax.Array, advantages: jax.Array
) -> jax.Array:
  """Returns the off-policy sequence mask [B T], 1 where an answer is kept.

  V3.2: a bad answer that has become much less likely since it was sampled
  teaches nothing. It leaves the policy term alone, neither the KL term nor any
  denominator. Tokens that the sampler did not score say nothing.
  """
  if cfg.off_policy_bound is None:
    return jnp.ones_like(policy)
  policy = jax.lax.stop_gradient(policy)
  gap = jnp.where(jnp.isnan(tokens.sampler), 0, tokens.sampler - policy)
  gap = answer_means(gap, tokens.mask, tokens.answers)
  dropped = (advantages < 0) & (gap > cfg.off_policy_bound)
  return 1 - dropped.astype(policy.dtype)


def divergence(kind: str, d: jax.Array, ratio: jax.Array) -> jax.Array:
  """Returns an estimate of KL(policy || reference) for each token.

  On-policy all have its value or nearly so; as a loss their gradients differ:
  k1 has none in expectation, k2 and ratio_k3 that of the KL, k3 that of the
  opposite KL.

  Args:
    kind: 'k1', 'k2', 'k3' or 'ratio_k3' (V3.2's).
    d: log-probs of the reference minus the policy's.
    ratio: policy over old policy, which ratio_k3 differentiates; the answer's
      under ratio='sequence' (as in TRL), where it is V3.2's no more.
  """
  if kind == 'k1':
    return -d
  if kind == 'k2':
    return d * d / 2
  k3 = jnp.expm1(d) - d
  return ratio * k3 if kind == 'ratio_k3' else k3


def weights(aggregation: str, mask: jax.Array, answers: jax.Array) -> jax.Array:
  """Returns the weight [B T] of each token; their sum is the denominator.

  That is the number of answers that have a token to learn from, or of tokens.

  Args:
    aggregation: see GRPOConfig.
    mask: [B T], 1 on tokens that learn.
    answers: [B T].
  """
  if aggregation not in ('sequence_mean', 'constant'):
    return mask
  count = answer_sums(mask, answers)
  return mask / jnp.where(count > 0, count, 1)


def total(
  cfg: Any,
  values: jax.Array,
  tokens: PolicyTokens,
  denominator: jax.Array,
  micro_batches: int = 1,
) -> jax.Array:
  """Returns a micro-batch's share of the aggregate of `values` [B T].

  Args:
    cfg: a GRPOConfig.
    values: of each token.
    tokens: of the micro-batch.
    denominator: sum of `weights` over the whole optimiser step.
    micro_batches: of the step.
  """
  mask = tokens.mask
  if cfg.aggregation == 'sum':
    return (values * mask).sum()
  if cfg.aggregation == 'micro_batch_mean':
    own = mask.sum()
    return (values * mask).sum() / jnp.where(own > 0, own, 1) / micro_batches
  if cfg.aggregation == 'constant':  # the denominator counts answers
    return (values * mask).sum() / (denominator * cfg.length)
  of_token = weights(cfg.aggregation, mask, tokens.answers)
  return (values * of_token).sum() / denominator


def loss(cfg: Any, tokens: PolicyTokens) -> jax.Array:
  """Returns the loss of a whole optimiser step, in one micro-batch."""
  denominator = weights(cfg.aggregation, tokens.mask, tokens.answers).sum()
  denominator = jnp.where(denominator > 0, denominator, 1)
  return -total(cfg, terms(cfg, tokens).objective, tokens, denominator)
