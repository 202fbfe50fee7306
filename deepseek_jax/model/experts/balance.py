"""Keeps experts evenly used: balance losses and the bias update.

V3 (arXiv:2412.19437 section 2.1.2): a bias moved by the sign of each expert's
load error, and a small sequence-wise loss. V2 (arXiv:2405.04434 section
2.2.3): expert, device and communication losses. All are means over sequences,
to which one of padding alone adds 0.
Legend: B sequences, T tokens, E experts, K chosen, D device groups.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model.experts.router import Routing, shares
from deepseek_jax.parallel import per_device as local


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
  """Holds the weights of the balance losses; a weight of 0 leaves the loss out.

  Attributes:
    sequence: V3's sequence-wise loss (alpha; V3 1e-4).
    expert: V2's expert-level loss (alpha_1).
    device: V2's device-level loss (alpha_2).
    communication: V2's communication loss (alpha_3).
    devices: the device groups D of the last two; neighbouring experts.
    device_limit: devices M that a token may be sent to.
  """

  sequence: float = 0.0
  expert: float = 0.0
  device: float = 0.0
  communication: float = 0.0
  devices: int = 1
  device_limit: int = 1

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'balance.', sequence=0, expert=0, device=0, communication=0)
    at_least(self, 'balance.', devices=1, device_limit=1)

  def check(self, experts: int) -> None:
    """Raises InputError where the device groups don't fit the experts."""
    if experts % self.devices:
      raise InputError(
        f'balance.devices = {self.devices}: must divide experts = {experts}'
      )


def _counts(experts: jax.Array, num_experts: int) -> jax.Array:
  """Counts how often each expert is chosen: [B T K] -> [B E] float32."""
  hit = experts[..., None] == jnp.arange(num_experts)
  return hit.sum(axis=(1, 2), dtype=jnp.float32)


def _mean_over_valid(values: jax.Array, valid: jax.Array) -> jax.Array:
  """Averages [B T E] over the valid tokens of each sequence: [B E]."""
  mask = valid[..., None].astype(values.dtype)
  return (values * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def sequence_loss(scores: jax.Array, top_k: int, valid: jax.Array) -> jax.Array:
  """Computes V3 eq. 17-20 without alpha, averaged over sequences.

  f counts the top-k of the raw scores (no bias, no group limit), as written;
  it carries no gradient.

  Args:
    scores: [B T E] float32.
    top_k: K.
    valid: [B T] bool.

  Returns:
    A scalar, float32.
  """
  E = scores.shape[-1]
  _, chosen = local.top_k(jax.lax.stop_gradient(scores), top_k)
  # Padding chooses number E, which no count has.
  chosen = jnp.where(valid[..., None], chosen, E)
  tokens = jnp.maximum(valid.sum(axis=1), 1)[:, None]
  f = _counts(chosen, E) * E / (top_k * tokens)  # [B E]
  # P is the mean of the scores, made to add up to 1 for each token.
  return (f * _mean_over_valid(shares(scores), valid)).sum(axis=-1).mean()


def expert_terms(
  routing: Routing, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Computes V2's f and P of each expert, [B E] both.

  f counts the actual choices, P is the mean score.
  """
  E, K = routing.scores.shape[-1], routing.experts.shape[-1]
  tokens = jnp.maximum(valid.sum(axis=1), 1)[:, None]
  f = _counts(routing.experts, E) * E / (K * tokens)
  return f, _mean_over_valid(routing.scores, valid)


def expert_loss(routing: Routing, valid: jax.Array) -> jax.Array:
  """Computes V2 eq. 23-25 without alpha_1, averaged over sequences."""
  f, p = expert_terms(routing, valid)
  return (f * p).sum(axis=-1).mean()


def device_loss(routing: Routing, valid: jax.Array, devices: int) -> jax.Array:
  """Computes V2 eq. 26-28 without alpha_2, averaged over sequences."""
  f, p = expert_terms(routing, valid)
  f = f.reshape(f.shape[0], devices, -1).mean(axis=-1)  # [B D]
  p = p.reshape(p.shape[0], devices, -1).sum(axis=-1)  # [B D]
  return (f * p).sum(axis=-1).mean()


def communication_loss(
  routing: Routing, valid: jax.Array, devices: int, limit: int
) -> jax.Array:
  """Computes V2 eq. 29-31 without alpha_3, averaged over sequences.

  A token counts once per device that it is sent to.
  """
  E = routing.scores.shape[-1]
  device = routing.experts // (E // devices)  # padding lands on no device
  visited = (device[..., None] == jnp.arange(devices)).any(axis=2)  # [B T D]
  tokens = jnp.maximum(valid.sum(axis=1), 1)[:, None]
  f = visited.sum(axis=1) * devices / (limit * tokens)
  p = _mean_over_valid(routing.scores, valid)
  p = p.reshape(p.shape[0], devices, -1).sum(axis=-1)
  return (f * p).sum(axis=-1).mean()


def losses(
  cfg: BalanceConfig, routing: Routing, valid: jax.Array | None
) -> dict[str, jax.Array]:
  """Computes the losses with a weight above 0, each without its weight.

  Args:
    cfg: the weights.
    routing: of a batch.
    valid: [B T] bool; None: all tokens.

  Returns:
    name -> scalar, float32.
  """
  if valid is None:
    valid = jnp.ones(routing.experts.shape[:2], bool)
  K = routing.experts.shape[-1]
  out = {}
  if cfg.sequence:
    out['sequence'] = sequence_loss(routing.scores, K, valid)
  if cfg.expert:
    out['expert'] = expert_loss(routing, valid)
  if cfg.device:
    out['device'] = device_loss(routing, valid, cfg.devices)
  if cfg.communication:
    out['communication'] = communication_loss(
      routing, valid, cfg.devices, cfg.device_limit
    )
  return out


def weighted(cfg: BalanceConfig, values: dict[str, jax.Array]) -> jax.Array:
  """Returns the sum of the losses, each times its weight."""
  return sum(
    (getattr(cfg, name) * value for name, value in values.items()),
    start=jnp.float32(0),
  )


def updated_bias(
  bias: jax.Array, load: jax.Array, rate: jax.typing.ArrayLike
) -> jax.Array:
  """Returns V3's new bias: b + rate * sign(mean load - load), over [... E].

  `load` counts the whole global batch; an expert at the mean keeps its bias.
  """
  # Counts are integers, their mean need not be one.
  load = load.astype(jnp.float32)
  error = load.mean(axis=-1, keepdims=True) - load
  return bias + rate * jnp.sign(error)
