"""Computes DeepSeekMoE: shared experts and fine-grained routed experts.

y = shared(x) + sum of the chosen experts' outputs times their weights
(arXiv:2401.06066). Dropless: each expert takes as many tokens as choose it.
V2's capacity factor (arXiv:2405.04434 section 2.2.4) is an option of training.
Legend: B batch, T tokens, D model, E experts, K chosen, F expert hidden, N
tokens of a device, M rows sorted by expert.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import kernels
from deepseek_jax.model.context import Context
from deepseek_jax.model.experts import balance
from deepseek_jax.model.experts import statistics as routing_statistics
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.capacity import CapacityConfig, drop, exempted
from deepseek_jax.model.experts.ffn import FFN, FFNConfig, swiglu
from deepseek_jax.model.experts.router import Router, RouterConfig, Routing
from deepseek_jax.parallel import exchange
from deepseek_jax.parallel.sharding import Buffer, current, param
from pallas_kernels import grouped_matmul as gmm
from pallas_kernels import permute
from pallas_kernels.grouped_matmul.from_tokens import experts_of_tokens


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Describes a MoE layer.

  Attributes:
    experts: routed experts E.
    top_k: experts per token K.
    width: hidden size of one expert F.
    shared: shared experts; they form one SwiGLU of shared * width.
    router: how experts are chosen and weighted; may be a user's own.
    balance: losses that keep them evenly used.
    capacity: None never drops a token.
    limit: clamp inside every expert, the shared ones too (FFNConfig).
    float8: the routed experts' products in float8 with block scales, forward
      and backward (V3, arXiv:2412.19437, section 3.3). What rows share a
      scale in the weights' gradient depends on the batch and the mesh.
    redundant: further copies of busy experts, to serve with (see
      infer/redundant_experts.py); a model with them can't be trained.
  """

  experts: int
  top_k: int
  width: int
  shared: int = 1
  router: RouterConfig = RouterConfig()
  balance: BalanceConfig = BalanceConfig()
  capacity: CapacityConfig | None = None
  limit: float | None = None
  float8: bool = False
  redundant: int = 0

  def __post_init__(self):
    """Raises InputError for fields out of range or that do not fit together."""
    at_least(self, experts=1, top_k=1, width=1, shared=0, redundant=0)
    above(self, limit=0)
    if self.top_k > self.experts:
      raise InputError(
        f'top_k = {self.top_k}: must lie in 1..experts = {self.experts}'
      )
    self.router.check(self.experts, self.top_k)
    self.balance.check(self.experts)
    if self.capacity and self.experts % self.capacity.devices:
      raise InputError(
        f'capacity.devices = {self.capacity.devices}: must divide experts ='
        f' {self.experts}'
      )

  def build(self, dim: int, *, std: float, rngs: nnx.Rngs) -> 'MoE':
    """Returns the MoE layer of a model of width `dim`."""
    return MoE(self, dim, std=std, rngs=rngs)


def apply_experts(
  x: jax.Array,
  experts: jax.Array,
  weights: jax.Array,
  gate_up: jax.Array,
  down: jax.Array,
  *,
  limit: float | None = None,
  float8: bool = False,
) -> jax.Array:
  """Computes the routed experts on one device.

  Args:
    x: [N D] tokens.
    experts: [N K] int32, E for nowhere.
    weights: [N K] float32.
    gate_up: [E D 2 F]; down: [E F D].
    limit: see `swiglu`.
    float8: see `MoEConfig`.

  Returns:
    [N D], the weighted sum of the chosen experts' outputs.

  Raises:
    InputError: float8 with widths on a device that 128 doesn't divide.
  """
  E, D, _, F = gate_up.shape
  if float8 and (D % 128 or F % 128):
    raise InputError(
      f"moe.float8: a device has {F} of each expert's width and dim = {D};"
      ' both must be multiples of 128, or set moe.float8=False'
    )
  # Rows sorted by expert, each expert's filled up to whole blocks: [M D].
  plan = permute.plan(experts, E)
  gate_up = gate_up.reshape(E, D, 2 * F)
  if float8:
    y = experts_of_tokens(x, gate_up, down, plan, limit=limit)
    return permute.combine(y, weights, plan)
  # Gate, up and activation: [M D] -> [M F].
  h = _hidden(permute.permute(x, plan), gate_up, plan, limit)
  layout = {'block_expert': plan.block_expert, 'used': plan.used}
  # Down, [M F] -> [M D]; then rows return to their tokens, weighted.
  y = gmm.grouped_matmul(h, down, **layout)
  return permute.combine(y, weights, plan)


def _hidden(
  rows: jax.Array,
  gate_up: jax.Array,
  plan: permute.Plan,
  limit: float | None,
) -> jax.Array:
  """Computes gate, up and activation of sorted rows [M D]: [M F]."""
  layout = {'block_expert': plan.block_expert, 'used': plan.used}
  args = rows, gate_up
  return kernels.pick_local(
    'grouped_swiglu',
    lambda impl: gmm.grouped_swiglu(*args, **layout, limit=limit, impl=impl),
    lambda: swiglu(gmm.grouped_matmul(*args, **layout), limit),
    args,
  )


class MoE(nnx.Module):
  """Computes shared and routed experts."""

  def __init__(self, cfg: MoEConfig, dim: int, *, std: float, rngs: nnx.Rngs):
    """Makes the router, the experts' weights and the shared experts.

    With `redundant` copies there are E + redundant experts' weights, and two
    tables: the copies of each expert, and how many it has (one at first).
    """
    self.cfg = cfg
    E, D, F = cfg.experts, dim, cfg.width
    init = nnx.initializers.normal(std)
    self.router = cfg.router.build(
      D, experts=E, top_k=cfg.top_k, std=std, rngs=rngs
    )
    R = E + cfg.redundant
    self.gate_up = param(
      rngs, init, (R, D, 2, F), ('experts', 'embed', None, 'mlp')
    )
    self.down = param(rngs, init, (R, F, D), ('experts', 'mlp', 'embed'))
    if cfg.redundant:
      first = jnp.arange(E, dtype=jnp.int32)[:, None]
      copies = jnp.tile(first, (1, cfg.redundant + 1))
      self.copies = Buffer(copies, axes=(None, None))  # of each expert
      self.copy_count = Buffer(jnp.ones(E, jnp.int32), axes=(None,))
    if cfg.shared:
      shared = FFNConfig(cfg.shared * F, cfg.limit)
      self.shared = FFN(shared, D, std=std, rngs=rngs)

  def pick_copies(self, routing: Routing) -> Routing:
    """Replaces experts by copies of them, which tokens take in turn.

    Returns:
      The routing with numbers below E + redundant; that number is nowhere.
    """
    E, last = self.cfg.experts, self.cfg.experts + self.cfg.redundant
    chosen = routing.experts
    turn = jnp.arange(chosen.size // chosen.shape[-1]).reshape(chosen.shape[:2])
    # Padding has number E: it looks up any expert and is replaced below.
    expert = jnp.minimum(chosen, E - 1)
    turn = turn[..., None] % self.copy_count[...][expert]
    copy = self.copies[...][expert, turn]
    return routing._replace(experts=jnp.where(chosen < E, copy, last))

  def routed(
    self, x: jax.Array, routing: Routing
  ) -> tuple[jax.Array, jax.Array]:
    """Computes the routed experts, on a mesh by dispatch and combine.

    Args:
      x: [B T D].
      routing: which experts each token goes to.

    Returns:
      [B T D], and the number of choices that no first buffer of a mesh held.
    """
    B, T, D = x.shape
    cfg = self.cfg
    compute = functools.partial(
      apply_experts, limit=cfg.limit, float8=cfg.float8
    )
    weights = self.gate_up[...], self.down[...]
    if current():
      arrays = x, routing.experts, routing.weights
      return exchange.run(compute, arrays, weights, current())
    y = compute(
      x.reshape(B * T, D),
      routing.experts.reshape(B * T, -1),
      routing.weights.reshape(B * T, -1),
      *weights,
    )
    return y.reshape(B, T, D), jnp.int32(0)

  def __call__(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, dict]:
    """Returns y [B T D] of x [B T D], and statistics.

    Statistics: 'load' [E] int32, tokens that chose each expert; 'experts'
    [B T K] int32; 'dropped' int32, choices over capacity; 'losses', the
    balance losses without their weights; 'loss', their weighted sum; while
    training also those of `routing_statistics`.

    Raises:
      InputError: training with redundant copies, or routes for a user's own
        router.
    """
    cfg = self.cfg
    if ctx.routes is not None and type(self.router) is not Router:
      raise InputError(
        f'routes: {type(self.router).__name__} is a router of your own, which'
        ' does not replay them; leave them out'
      )
    # K experts of each token, their weights, and all scores [B T E].
    routing = self.router(x, ctx)
    values = balance.losses(cfg.balance, routing, ctx.valid)
    stats = {
      'load': routing.load,
      'experts': routing.experts,
      'dropped': jnp.int32(0),
      'losses': values,
      'loss': balance.weighted(cfg.balance, values),
    }
    if cfg.redundant and ctx.train:
      raise InputError(
        f'moe.redundant = {cfg.redundant}: copies of experts are for serving;'
        ' train with 0'
      )
    if ctx.train:
      # How a user's own router uses its bias is not known here.
      ours = type(self.router) is Router and cfg.router.bias
      bias = self.router.bias[...] if ours else None
      stats |= routing_statistics.statistics(routing, bias, cfg.router)
    # Load and losses above count the choices before any is dropped.
    if cfg.capacity and ctx.train:
      free = exempted(ctx.tokens, cfg.capacity.exempt)
      routing, stats['dropped'] = drop(routing, cfg.experts, cfg.capacity, free)
    if cfg.redundant:
      routing = self.pick_copies(routing)
    # Experts on their devices: [B T D] -> [B T D].
    y, missed = self.routed(x, routing)
    # A dropless exchange has sent them in further rounds.
    using = current()
    if using and not using.exchange.dropless:
      stats['dropped'] += missed
    if cfg.shared:
      y = y + self.shared(x, ctx)[0]
    return y, stats
