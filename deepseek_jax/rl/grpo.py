"""Defines group relative policy optimisation as an objective, and its presets.

R1-Zero and R1 (arXiv:2501.12948), V3.2 (arXiv:2512.02556), DAPO
(arXiv:2503.14476) and Dr. GRPO (arXiv:2503.20783) are settings of one
configuration.
Legend: B rows, T tokens, V vocabulary, W 32-bit words.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from deepseek_jax.config import above, at_least, check_choices
from deepseek_jax.errors import InputError
from deepseek_jax.model.context import documents
from deepseek_jax.record.metric import Metric
from deepseek_jax.rl import log_probs, policy
from deepseek_jax.rl.advantages import AdvantageConfig, LengthPenaltyConfig
from deepseek_jax.train.objective import (
  Inputs,
  Objective,
  Predictions,
  Shares,
  mtp_loss,
  next_token,
)

METRICS = {
  'loss': Metric('Loss'),
  # Not 'entropy', which is the routers'.
  'policy_entropy': Metric('Entropy', 'nats per token'),
  'kl': Metric('KL to the reference (k3)', 'nats per token'),
  'ratio': Metric('Ratio to the policy at rollout'),
  'clipped_low': Metric('Clipped below', 'share of tokens'),
  'clipped_high': Metric('Clipped above', 'share of tokens'),
  'clipped_dual': Metric('Clipped by the dual bound', 'share of tokens'),
  'limited': Metric('Log-ratios at their limit', 'share of tokens'),
  'kept': Metric('Kept by the off-policy mask', 'share of tokens'),
  'mismatch': Metric('Sampler against trainer', 'nats per token'),
  'mtp_loss': Metric('MTP loss', 'nats per token'),
}


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
  """Describes the objective, what rewards become, and what is replayed.

  Attributes:
    ratio: of each 'token', or one for the 'sequence' (GSPO): the exponential
      of its mean log-ratio.
    surrogate: 'clip' is min(ratio A, clipped ratio A); 'cispo' weighs log p by
      the clipped ratio, without its gradient.
    clip_low, clip_high: the ratio is clipped to 1 - clip_low..1 + clip_high;
      None does not clip. From 1 on clip_low never binds: R1's 10 bounds good
      tokens at 11 and bad ones not at all.
    dual_clip: bad tokens count at most this ratio; None: without a bound.
    kl: estimate of KL(policy || reference) in the loss; 'ratio_k3' is V3.2's,
      'k3' R1's (see `policy.divergence` for their gradients).
    kl_weight: beta.
    reference_every: updates after which the policy becomes the reference (R1:
      400); 0: the reference stays.
    off_policy_bound: V3.2's delta: an answer with a negative advantage whose
      mean log-ratio to the sampler fell by more leaves the policy term. None:
      all stay. No paper gives a value; those in use lie between 1e-4 and 0.5.
    aggregation: over tokens and answers of the whole optimiser step:
      'sequence_mean': mean over answers of the mean over tokens (DeepSeekMath,
      V3.2); 'token_mean': over all tokens (DAPO); 'micro_batch_mean': over
      those of each micro-batch (TRL's bnpo), which depends on its size;
      'constant': sum over answers * `length` (Dr. GRPO); 'sum': not divided.
      Answers without a token to learn from count nowhere.
    length: of 'constant'.
    temperature: that tokens were sampled at.
    log_ratio_limit: log-ratios are clipped to +-this before their exponential.
    advantage: see there.
    mask_truncated: answers cut at the length limit teach nothing; they stay in
      their group's mean.
    length_penalty: added to rewards; None: nothing.
    dynamic_sampling: groups whose rewards are equal, before a length penalty,
      teach nothing; others are drawn in their place, see RolloutConfig.redraws
      (DAPO).
    keep_sampling_mask: log-probs are those of the tokens that top-p or top-k
      kept (V3.2), read from the batch's 'kept'.
    keep_routing: experts are those that the sampler's routers chose (V3.2),
      read from the batch's 'routes'.
    mtp: the blocks that predict further ahead are 'frozen', or 'trained' on
      rollouts to predict what is sampled, right or wrong; that reaches these
      blocks alone.
    router_bias: is 'frozen', or 'updated' by the loads of what is learnt from,
      at train.bias_rate. With keep_routing these are the sampler's choices.
  """

  ratio: Literal['token', 'sequence'] = 'token'
  surrogate: Literal['clip', 'cispo'] = 'clip'
  clip_low: float | None = 0.2
  clip_high: float | None = 0.2
  dual_clip: float | None = None
  kl: Literal['none', 'k1', 'k2', 'k3', 'ratio_k3'] = 'none'
  kl_weight: float = 0.0
  reference_every: int = 0
  off_policy_bound: float | None = None
  aggregation: Literal[
    'sequence_mean', 'token_mean', 'micro_batch_mean', 'constant', 'sum'
  ] = 'sequence_mean'
  length: int | None = None
  temperature: float = 1.0
  log_ratio_limit: float = 20.0
  advantage: AdvantageConfig = AdvantageConfig()
  mask_truncated: bool = False
  length_penalty: LengthPenaltyConfig | None = None
  dynamic_sampling: bool = False
  keep_sampling_mask: bool = False
  keep_routing: bool = False
  mtp: Literal['frozen', 'trained'] = 'frozen'
  router_bias: Literal['frozen', 'updated'] = 'frozen'

  def __post_init__(self) -> None:
    """Raises InputError for fields out of range or that do not fit."""
    check_choices(self)
    at_least(self, clip_low=0, clip_high=0, dual_clip=1, kl_weight=0)
    at_least(self, off_policy_bound=0, length=1, reference_every=0)
    above(self, temperature=0, log_ratio_limit=0)
    if (self.aggregation == 'constant') != (self.length is not None):
      raise InputError(
        f"length = {self.length}: aggregation = 'constant' divides by it and"
        ' others do not; set both or neither'
      )
    if (self.kl == 'none') != (self.kl_weight == 0):
      raise InputError(
        f'kl_weight = {self.kl_weight}: kl = {self.kl!r}; the loss has a KL'
        " term with a kind and a weight above 0, or none with 'none' and 0"
      )
    if self.reference_every and self.kl == 'none':
      raise InputError(
        f"reference_every = {self.reference_every}: kl = 'none' has no"
        ' reference; set it to 0, or kl to a kind'
      )

  def build(self, model: Any) -> Objective:
    """Returns the objective of batches with the fields of `BATCH`."""
    del model

    def loss(
      predictions: Predictions, inputs: Inputs, shares: Shares
    ) -> tuple[jax.Array, dict]:
      return _loss(self, predictions, inputs, shares)

    def inputs(batch: Mapping[str, jax.Array]) -> Inputs:
      return _inputs(self, batch)

    return Objective(
      loss,
      inputs,
      mtp='alone' if self.mtp == 'trained' else False,
      metrics=METRICS,
      moves_biases=self.router_bias == 'updated',
      # Around 0, and as large as rewards happen to differ.
      comparable=False,
    )


# Fields of a batch [B T+1] beside 'tokens', 'segments' and 'positions', each at
# the token that it describes. A segment holds one prompt and its answer.
BATCH = {
  'trained': 'float32, 1 on sampled tokens, the end token with them',
  'advantages': 'float32',
  'old': "float32 log-probs at rollout's weights; absent: those of this step",
  'sampler': 'float32 log-probs as sampled, NaN unknown; absent: `old`',
  'reference': 'float32 log-probs under the reference, with a KL term',
  'kept': '[B T+1 W] uint32, with keep_sampling_mask',
  'routes': '[B T+1 L K] integers, with keep_routing: experts of a token as it'
  ' was read; -1 where that is not known',
}


def _inputs(cfg: GRPOConfig, batch: Mapping[str, jax.Array]) -> Inputs:
  """Returns the inputs of a batch; weights add up to the denominator."""
  needed = ['trained', 'advantages']
  needed += ['reference'] * (cfg.kl != 'none')
  needed += ['kept'] * cfg.keep_sampling_mask
  needed += ['routes'] * cfg.keep_routing
  missing = [name for name in needed if name not in batch]
  if missing:
    raise InputError(
      f'batch has no {missing[0]!r} ({BATCH[missing[0]]}): the objective reads'
      f' {", ".join(needed)}'
    )
  read = next_token(batch)
  mask = batch['trained'][:, 1:] * read.weights
  answers = _answers(read)
  routes = batch['routes'][:, :-1] if cfg.keep_routing else None
  weights = policy.weights(cfg.aggregation, mask, answers)
  return read._replace(weights=weights, routes=routes)


def _answers(inputs: Inputs) -> jax.Array:
  """Returns the number of each label's answer [B T]: its document's."""
  if inputs.segments is None:
    return jnp.ones_like(inputs.labels)
  # Runs, numbered from 1: an id may come twice in a row, or be large.
  return documents(inputs.segments)


def _loss(
  cfg: GRPOConfig, predictions: Predictions, inputs: Inputs, shares: Shares
) -> tuple[jax.Array, dict]:
  """Returns a micro-batch's share of the loss, and metrics."""
  batch, mask = inputs.batch, (inputs.weights > 0).astype(jnp.float32)
  kept = batch['kept'][:, 1:] if cfg.keep_sampling_mask else None
  now, entropy = log_probs.sampled(
    predictions.hidden,
    predictions.head,
    inputs.labels,
    mask,
    temperature=cfg.temperature,
    kept=kept,
  )
  of = lambda name, default: batch[name][:, 1:] if name in batch else default
  # Without values of its own, this step is on-policy: the ratio is 1.
  old = of('old', jax.lax.stop_gradient(now))
  tokens = policy.PolicyTokens(
    policy=now,
    old=old,
    sampler=of('sampler', old),
    reference=of('reference', None),
    advantages=of('advantages', None),
    mask=mask,
    answers=_answers(inputs),
  )
  made = policy.terms(cfg, tokens)
  loss = -policy.total(
    cfg, made.objective, tokens, shares.denominator, shares.micro_batches
  )
  mean = lambda x: (x * inputs.weights).sum() / shares.denominator
  statistics = made.statistics | {'policy_entropy': entropy}
  metrics = {'loss': loss} | {k: mean(v) for k, v in statistics.items()}
  if 'mtp_hidden' in predictions.aux:
    head = jax.lax.stop_gradient(predictions.head)
    extra = mtp_loss(predictions._replace(head=head), inputs)
    extra /= shares.denominator
    metrics['mtp_loss'] = extra
    loss += shares.mtp_weight * extra
  return loss, metrics


def r1_zero() -> GRPOConfig:
  """Returns R1-Zero's objective; its clip range is not published, so R1's."""
  return GRPOConfig(
    clip_low=10.0,
    clip_high=10.0,
    kl='k3',
    kl_weight=0.001,
    reference_every=400,
  )


def r1() -> GRPOConfig:
  """Returns the objective of R1's first RL stage (the second: T = 0.7)."""
  return r1_zero()


def v32(
  *, off_policy_bound: float | None, kl_weight: float = 0.001
) -> GRPOConfig:
  """Returns V3.2's objective.

  Args:
    off_policy_bound: delta, which is not published: log the share kept. None
      leaves the mask out.
    kl_weight: beta, which V3.2 varies by domain, down to 0; this one is R1's.
  """
  return GRPOConfig(
    kl='ratio_k3' if kl_weight else 'none',
    kl_weight=kl_weight,
    off_policy_bound=off_policy_bound,
    advantage=AdvantageConfig(scale='none'),
    keep_sampling_mask=True,
    keep_routing=True,
  )


def dapo(*, most: int = 20480, soft: int | None = None) -> GRPOConfig:
  """Returns DAPO's objective, with answers of at most `most` tokens.

  The last `soft` of them are penalised; None takes the paper's fifth.
  """
  soft = max(1, most // 5) if soft is None else soft
  return GRPOConfig(
    clip_high=0.28,
    aggregation='token_mean',
    length_penalty=LengthPenaltyConfig(most, soft),
    dynamic_sampling=True,
  )


def dr_grpo(*, length: int) -> GRPOConfig:
  """Returns Dr. GRPO's objective, sums over answers of `length` at most."""
  return GRPOConfig(
    aggregation='constant',
    length=length,
    advantage=AdvantageConfig(scale='none'),
  )


# By the name that --config.objective.kind takes, of the longest answer. V3.2's
# delta is left to a flag.
PRESETS: Mapping[str, Callable[[int], GRPOConfig]] = {
  'r1_zero': lambda most: r1_zero(),
  'r1': lambda most: r1(),
  'v32': lambda most: v32(off_policy_bound=None),
  # DAPO's penalty begins at four fifths of the longest answer.
  'dapo': lambda most: dapo(most=most),
  'dr_grpo': lambda most: dr_grpo(length=most),
}
