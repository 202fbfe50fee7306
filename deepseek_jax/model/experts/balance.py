"""What keeps experts evenly used: balance losses and the bias update.

V3 (arXiv:2412.19437 section 2.1.2): a bias moved by the sign of each expert's
load error, and a small sequence-wise loss. V2 (arXiv:2405.04434 section
2.2.3): expert, device and communication losses.
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
  """Weights of the balance losses; a weight of 0 leaves the loss out.

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
    at_least(self, 'balance.', sequence=0, expert=0, device=0, communication=0)
    at_least(self, 'balance.', devices=1, device_limit=1)

  def check(self, experts: int) -> None:
    """Raises InputError where the device groups don't fit the experts."""
    if experts % self.devices:
      raise InputError(
        f'balance.devices = {self.devices}: must divide experts = {experts}'
      )


def _counts(experts, num_experts):
  """How often each expert is chosen: [B T K] -> [B E] float32."""
  hit = experts[..., None] == jnp.arange(num_experts)
  return hit.sum(axis=(1, 2), dtype=jnp.float32)


def _mean_over_valid(values, valid):
  """[B T E] -> [B E], averaged over the valid tokens of each sequence."""
  mask = valid[..., None].astype(values.dtype)
  return (values * mask).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def sequence_loss(scores, top_k: int, valid) -> jax.Array:
  """V3 eq. 17-20 without alpha, averaged over sequences.

  f counts the top-k of the raw scores (no bias, no group limit), as written;
  it carries no gradient. scores [B T E], valid [B T] bool -> scalar.
  """
  E = scores.shape[-1]
  _, chosen = local.top_k(jax.lax.stop_gradient(scores), top_k)
  chosen = jnp.where(valid[..., None], chosen, E)
  tokens = jnp.maximum(valid.sum(axis=1), 1)[:, None]
  f = _counts(chosen, E) * E / (top_k * tokens)
  return (f * _mean_over_valid(shares(scores), valid)).sum(axis=-1).mean()


def expert_terms(routing: Routing, valid):
  """V2's f and P per expert, [B E] each: actual choices and mean scores."""
  E, K = routing.scores.shape[-1], routing.experts.shape[-1]
  tokens = jnp.maximum(valid.sum(axis=1), 1)[:, None]
  f = _counts(routing.experts, E) * E / (K * tokens)
  return f, _mean_over_valid(routing.scores, valid)


def expert_loss(routing: Routing, valid) -> jax.Array:
  """V2 eq. 23-25 without alpha_1, averaged over sequences."""
  f, p = expert_terms(routing, valid)
  return (f * p).sum(axis=-1).mean()


def device_loss(routing: Routing, valid, devices: int) -> jax.Array:
  """V2 eq. 26-28 without alpha_2, averaged over sequences."""
  f, p = expert_terms(routing, valid)
  f = f.reshape(f.shape[0], devices, -1).mean(axis=-1)
  p = p.reshape(p.shape[0], devices, -1).sum(axis=-1)
  return (f * p).sum(axis=-1).mean()


def communication_loss(
  routing: Routing, valid, devices: int, limit: int
) -> jax.Array:
  """V2 eq. 29-31 without alpha_3: a token counts once per device it visits."""
  E = routing.scores.shape[-1]
  device = routing.experts // (E // devices)  # padding lands on no device
  visited = (device[..., None] == jnp.arange(devices)).any(axis=2)  # [B T D]
  tokens = jnp.maximum(valid.sum(axis=1), 1)[:, None]
  f = visited.sum(axis=1) * devices / (limit * tokens)
  p = _mean_over_valid(routing.scores, valid)
  p = p.reshape(p.shape[0], devices, -1).sum(axis=-1)
  return (f * p).sum(axis=-1).mean()


def losses(cfg: BalanceConfig, routing: Routing, valid) -> dict:
  """The losses with a weight above 0, each without its weight."""
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


def weighted(cfg: BalanceConfig, values: dict) -> jax.Array:
  """The sum of the losses, each times its weight."""
  return sum(
    (getattr(cfg, name) * value for name, value in values.items()),
    start=jnp.float32(0),
  )


def updated_bias(bias: jax.Array, load: jax.Array, rate) -> jax.Array:
  """V3's rule: b + rate * sign(mean load - load), over [... E].

  `load` counts the whole global batch; an expert at the mean keeps its bias.
  """
  load = load.astype(jnp.float32)
  error = load.mean(axis=-1, keepdims=True) - load
  return bias + rate * jnp.sign(error)
