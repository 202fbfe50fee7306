"""Routes tokens to experts: scores, groups, bias, top-k, weights.

The released algorithms are settings of one computation: V2-Lite's greedy
softmax, V2's group-limited softmax (arXiv:2405.04434 section 2.2.2) and V3's
sigmoid with a selection bias (arXiv:2412.19437 section 2.1.2). The bias moves
the choice of experts and never their weight. V4 takes sqrt(softplus) for the
sigmoid, and in its first layers the token itself decides, by a fixed table
(hash routing); scores then give the weights alone.
Legend: B batch, T tokens, D model, E experts, K chosen, G groups, V vocabulary.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deepseek_jax.config import above, at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model import kernels, lookup
from deepseek_jax.model.context import Context
from deepseek_jax.parallel import per_device as local
from deepseek_jax.parallel.sharding import Buffer, param
from pallas_kernels.router import Rule, normalized, router


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Describes how experts are chosen and weighted.

  A user's own router is any dataclass with the methods `check` and `build`,
  whose module maps x [B T D] and the context to a `routing`. If the module has
  a buffer `bias` [E], the load moves it as it moves this one's.

  Attributes:
    scoring: affinity of a token to an expert.
    groups: experts lie in this many groups of neighbours (V3: nodes) ...
    top_groups: ... of which a token may use this many.
    group_score: a group counts by its best expert (V2) or its best two (V3).
    bias: a selection bias per expert, moved by load and by no gradient (V3).
    normalize: the chosen weights are divided by their sum (V3).
    scale: multiplies the weights (routed_scaling_factor).
    hash_vocab: tokens of the table that chooses in place of the scores, which
      is the model's vocabulary; 0 without one.
  """

  scoring: Literal['softmax', 'sigmoid', 'sqrtsoftplus'] = 'sigmoid'
  groups: int = 1
  top_groups: int = 1
  group_score: Literal['max', 'top2'] = 'top2'
  bias: bool = True
  normalize: bool = True
  scale: float = 1.0
  hash_vocab: int = 0

  def __post_init__(self):
    """Raises InputError for a field out of its range."""
    at_least(self, 'router.', groups=1, top_groups=1, hash_vocab=0)
    above(self, 'router.', scale=0)

  def check(self, experts: int, top_k: int) -> None:
    """Raises InputError where groups, experts and top_k don't fit."""
    if experts % self.groups:
      raise InputError(
        f'router.groups = {self.groups}: must divide experts = {experts}'
      )
    if self.top_groups > self.groups:
      raise InputError(
        f'router.top_groups = {self.top_groups}: must lie in 1..groups ='
        f' {self.groups}'
      )
    reach = experts // self.groups * self.top_groups
    if top_k > reach:
      raise InputError(
        f'top_k = {top_k}: more than the {reach} experts of'
        f' {self.top_groups} groups; lower top_k or raise router.top_groups'
      )
    two = self.group_score == 'top2' and self.groups > 1
    if two and experts // self.groups < 2:
      raise InputError(
        "router.group_score = 'top2': needs groups of at least 2 experts;"
        " lower router.groups or use 'max'"
      )
    if self.hash_vocab and (self.bias or self.groups > 1):
      raise InputError(
        f'router.hash_vocab = {self.hash_vocab}: must be 0 unless router.bias ='
        ' False and router.groups = 1'
      )

  def build(
    self, dim: int, *, experts: int, top_k: int, std: float, rngs: nnx.Rngs
  ) -> 'Router':
    return Router(self, dim, experts, top_k, std=std, rngs=rngs)


class Routing(NamedTuple):
  """Holds where tokens go.

  An expert number E means nowhere (padding, dropped).
  """

  experts: jax.Array  # [B T K] int32
  weights: jax.Array  # [B T K] float32
  scores: jax.Array  # [B T E] float32, affinities without bias
  load: jax.Array | None = None  # [E] int32, valid tokens of each expert


def routing(
  experts: jax.Array,
  weights: jax.Array,
  scores: jax.Array,
  valid: jax.Array | None,
  load: jax.Array | None = None,
) -> Routing:
  """Returns the routing of a choice; padding goes nowhere and counts nothing.

  Args:
    experts: [B T K] int32, chosen by each token.
    weights: [B T K] float32.
    scores: [B T E] float32.
    valid: [B T] bool, or None where every token is.
    load: [E] int32 if it is known for all tokens.
  """
  nowhere = scores.shape[-1]
  if valid is not None:
    experts = jnp.where(valid[..., None], experts, nowhere)
    weights = jnp.where(valid[..., None], weights, 0.0)
    load = None  # padding was counted
  if load is None:
    load = jnp.bincount(experts.reshape(-1), length=nowhere)
  return Routing(experts, weights, scores, load)


def score(logits: jax.Array, scoring: str) -> jax.Array:
  """Computes the affinities [... E] of float32 router logits [... E]."""
  if scoring == 'softmax':
    return jax.nn.softmax(logits, axis=-1)
  if scoring == 'sqrtsoftplus':
    # Far below 0 softplus is exp, whose root stays differentiable in float32.
    low = logits < -20
    root = jnp.sqrt(jax.nn.softplus(jnp.where(low, 0.0, logits)))
    return jnp.where(low, jnp.exp(jnp.where(low, logits, 0.0) / 2), root)
  if scoring != 'sigmoid':  # a subclass of RouterConfig may allow others
    raise InputError(
      f'router.scoring = {scoring!r}: is not known here; a router with another'
      ' has its own build, see RouterConfig'
    )
  return jax.nn.sigmoid(logits)


def shares(scores: jax.Array) -> jax.Array:
  """Returns non-negative scores [... E] made to add up to 1.

  Where none of them is a normal number (a sigmoid of -88 and less) all are
  taken as equal, and have no gradient.
  """
  top = jax.lax.stop_gradient(scores).max(axis=-1, keepdims=True)
  none = top < jnp.finfo(jnp.float32).tiny
  # By the largest first: the gradient of a quotient squares the sum.
  scores = jnp.where(none, 1.0, scores / jnp.where(none, 1.0, top))
  return scores / scores.sum(axis=-1, keepdims=True)


def limit_groups(choice: jax.Array, cfg: RouterConfig) -> jax.Array:
  """Sets all but the best groups of choice [... E] to -inf.

  Not to 0: a biased score can be negative, and a 0 would then win against it.
  """
  if cfg.groups == 1:
    return choice
  E = choice.shape[-1]
  grouped = choice.reshape(*choice.shape[:-1], cfg.groups, E // cfg.groups)
  # A group counts by its best expert, or its best two: [... G].
  if cfg.group_score == 'max':
    rank = grouped.max(axis=-1)
  else:
    rank = local.top_k(grouped, 2)[0].sum(axis=-1)  # [... G]
  _, best = local.top_k(rank, cfg.top_groups)
  keep = jnp.any(best[..., None] == jnp.arange(cfg.groups), axis=-2)
  return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(choice.shape)


def choose(
  scores: jax.Array, bias: jax.Array | None, top_k: int, cfg: RouterConfig
) -> tuple[jax.Array, jax.Array]:
  """Chooses experts [... K] int32 by scores [... E] and bias [E].

  Equal scores favour the lower expert number.

  Returns:
    The experts, and their weights [... K] float32, without the bias.
  """
  choice = jax.lax.stop_gradient(scores)
  if bias is not None:
    choice = choice + jax.lax.stop_gradient(bias)
  _, experts = local.top_k(limit_groups(choice, cfg), top_k)
  return experts, weigh(scores, experts, cfg)


def weigh(
  scores: jax.Array, experts: jax.Array, cfg: RouterConfig
) -> jax.Array:
  """Returns the weights [... K] of `experts` by their scores [... E]."""
  weights = jnp.take_along_axis(scores, experts, axis=-1)
  if cfg.normalize:
    weights = normalized(weights, Rule.eps)
  return weights * cfg.scale


def replayed(experts: jax.Array, routes: jax.Array, count: int) -> jax.Array:
  """Returns routes [B T K], the live experts [B T K] where there are none.

  Args:
    experts: that the live router has chosen.
    routes: that a sampler's router chose; -1, or any number that is no expert,
      leaves the choice for that token to the live router.
    count: E.
  """
  known = ((routes >= 0) & (routes < count)).all(axis=-1, keepdims=True)
  return jnp.where(known, routes, experts).astype(experts.dtype)


def hash_table(
  key: jax.Array, vocab: int, experts: int, top_k: int
) -> jax.Array:
  """Makes a random fixed map from tokens to distinct experts, [V K] int32.

  Tokens are shuffled and taken E at a time; the n-th of them gets experts
  n + o_1 ... n + o_K modulo E, with offsets o drawn anew for each E. So every E
  tokens use each expert K times. How the released tables were made is unknown.
  """
  rounds = -(-vocab // experts)
  shuffle, draw = jax.random.split(key)
  place = jax.random.permutation(shuffle, vocab)  # [V]
  noise = jax.random.uniform(draw, (rounds, experts))
  offsets = jnp.argsort(noise, axis=1)[:, :top_k]
  table = place[:, None] + offsets[place // experts]
  return (table % experts).astype(jnp.int32)


class Router(nnx.Module):
  """Chooses and weights the experts of each token."""

  def __init__(
    self,
    cfg: RouterConfig,
    dim: int,
    experts: int,
    top_k: int,
    *,
    std: float,
    rngs: nnx.Rngs,
  ):
    """Makes the weight [D E], and the bias [E] or the hash table [V K].

    Args:
      cfg: see there.
      dim: D.
      experts: E.
      top_k: K.
      std: of the weight.
      rngs: random streams of `params`.
    """
    self.cfg, self.top_k = cfg, top_k
    init = nnx.initializers.normal(std)
    self.weight = param(
      rngs, init, (dim, experts), ('embed', None), full_precision=True
    )
    if cfg.bias:
      self.bias = Buffer(jnp.zeros(experts, jnp.float32), axes=(None,))
    if cfg.hash_vocab:
      table = hash_table(rngs.params(), cfg.hash_vocab, experts, top_k)
      self.table = Buffer(table, axes=(None, None))

  def _routed(
    self, impl: str, logits: jax.Array, bias: jax.Array | None
  ) -> tuple[jax.Array, jax.Array]:
    """Computes `choose` and the scores before it in one kernel.

    Args:
      impl: 'reference' or 'gpu'.
      logits: [B T E] float32.
      bias: [E], or None.

    Returns:
      Experts and weights [B T K].
    """
    cfg = self.cfg
    rule = Rule(
      cfg.scoring,
      cfg.groups,
      cfg.top_groups,
      cfg.group_score,
      cfg.normalize,
      cfg.scale,
    )
    flat = logits.reshape(-1, logits.shape[-1])
    # Its count is of tokens alone: padding and other devices change it.
    *out, _ = router(flat, bias, top_k=self.top_k, rule=rule, impl=impl)
    return tuple(a.reshape(*logits.shape[:-1], self.top_k) for a in out)

  def __call__(self, x: jax.Array, ctx: Context) -> Routing:
    """Returns the routing of x [B T D]; padding goes nowhere."""
    # float32: with many experts bfloat16 scores tie, and low numbers would win.
    logits = jnp.einsum(
      'BTD,DE->BTE',
      x.astype(jnp.float32),
      self.weight[...].astype(jnp.float32),
      precision='highest',
    )
    # Affinities [B T E] without the bias: they weigh, and enter the losses.
    scores = score(logits, self.cfg.scoring)
    if self.cfg.hash_vocab:
      nowhere = scores.shape[-1]  # for what is no token
      experts = lookup.rows(self.table[...], ctx.tokens, fill=nowhere)
      weights = weigh(scores, experts, self.cfg)
    else:
      # The bias takes part in the choice alone.
      bias = self.bias[...] if self.cfg.bias else None
      token = ('batch', 'seq')
      experts, weights = kernels.pick(
        'router',
        self._routed,
        lambda: choose(scores, bias, self.top_k, self.cfg),
        (logits, bias),
        (token, ()),
        (token, token),
      )
      if ctx.routes is not None:
        experts = replayed(experts, ctx.routes, scores.shape[-1])
        # Live scores weigh, so the router learns.
        weights = weigh(scores, experts, self.cfg)
    return routing(experts, weights, scores, ctx.valid)
