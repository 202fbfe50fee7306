"""Applies the second half of a step: from gradients to the next variables.

Every part of a model, all of it or one pipeline stage, proposes an update. The
whole batch is judged once, by its loss, the norm of its gradient and that of
the update; then every part takes its proposal, or none does.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.model.experts.balance import updated_bias
from deepseek_jax.record.metric import Metric
from deepseek_jax.train import schedules
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.gate import GateState, judge
from deepseek_jax.train.gradient_norms import block_norms, tree_norm

METRICS = {
  'grad_norm': Metric('Gradient norm'),
  'update_norm': Metric('Update norm', 'at a learning rate of 1'),
  'learning_rate': Metric('Learning rate'),
  'applied': Metric('Updates applied'),
  'skipped': Metric('Updates skipped', 'so far', over='last'),
  'streak': Metric('Updates skipped in a row', over='last'),
}


class Held(NamedTuple):
  """Holds what an update changes, of a model or of a stage of it."""

  params: Any
  buffers: Any
  moments: Any


class Proposal(NamedTuple):
  """Holds the update proposed for a model or for a stage of it.

  Attributes:
    updates: of the parameters, at a learning rate of 1.
    moments: after it.
    norm: of the updates, over parameters that are finite.
    norms: of the same by block, see `block_norms`.
  """

  updates: Any
  moments: Any
  norm: jax.Array
  norms: dict[str, jax.Array]


class Verdict(NamedTuple):
  """Holds what all stages of a model must know of a step.

  Attributes:
    applied: whether the update is.
    rate: learning rate.
    bias_rate: gamma of the router biases.
  """

  applied: jax.Array
  rate: jax.Array
  bias_rate: jax.Array


def tokens_seen(state: Any, length: int) -> jax.Array:
  """Returns the tokens before this step, float32, of sequences of `length`."""
  return state.sequences.astype(jnp.float32) * length


def proposed(
  optimizer: optax.GradientTransformationExtraArgs,
  held: Held,
  grads: Any,
  norm: jax.Array,
) -> Proposal:
  """Returns the update proposed for a model or for a stage of it.

  Args:
    optimizer: of `recipe.optimizer_of`.
    held: before the step.
    grads: shaped as held.params.
    norm: of the whole model's gradient.
  """
  updates, moments = optimizer.update(
    grads, held.moments, held.params, norm=norm
  )
  # Weight decay turns a NaN parameter's update into NaN; such a parameter is
  # lost already, whatever is added to it, and maybe no batch reads it: it has
  # no part in the norm.
  sound = lambda p, u: jnp.where(jnp.isfinite(p), u, 0)
  updates = jax.tree.map(sound, held.params, updates)
  norms = block_norms(updates)
  return Proposal(updates, moments, tree_norm(norms), norms)


def moments_after(
  verdict: Verdict,
  optimizer: optax.GradientTransformationExtraArgs,
  held: Held,
  grads: Any,
  norm: jax.Array,
) -> Any:
  """Returns the moments of `proposed` once more, from the gradient.

  Those of the proposal would have to be stored until the verdict. These depend
  on it, or XLA would see one computation; if the update is refused, they are
  not to be used.

  Args:
    verdict: on the proposal.
    optimizer, held, grads, norm: as of `proposed`.
  """
  norm = jnp.where(verdict.applied, norm, 0.0)
  return optimizer.update(grads, held.moments, held.params, norm=norm)[1]


def judged(
  cfg: TrainConfig,
  state: Any,
  loss: jax.Array,
  norm: jax.Array,
  update_norm: jax.Array,
  length: int,
) -> tuple[Verdict, GateState, dict]:
  """Decides what becomes of a step.

  Args:
    cfg: the recipe.
    state: before the step; `step`, `sequences` and `gate` are read.
    loss: of the global batch.
    norm: of its gradient.
    update_norm: of what the optimizer makes of it; a gradient that is finite
      may give one that is not, with moments that are damaged.
    length: tokens of a sequence.

  Returns:
    The verdict, the gate's next state, and the metrics that report them.
  """
  # One verdict for the whole batch: all stages apply, or none does.
  tokens = tokens_seen(state, length)
  sound = jnp.isfinite(update_norm)
  applied, gate = judge(cfg.gate, state.gate, loss, norm, sound)
  verdict = Verdict(
    applied,
    schedules.learning_rate(cfg.schedule, state.step, tokens, cfg.tokens),
    cfg.bias_rate.at(tokens, cfg.tokens),
  )
  metrics = {
    'grad_norm': norm,
    'update_norm': update_norm,
    'learning_rate': verdict.rate,
    'applied': applied,
    'skipped': gate.skipped,
    'streak': gate.streak,
  }
  return verdict, gate, metrics


def updated(
  held: Held,
  proposal: Proposal,
  loads: dict[str, jax.Array],
  verdict: Verdict,
) -> Held:
  """Returns the variables and moments after a step.

  Args:
    held: before the step.
    proposal: see `proposed`.
    loads: of the routers in held.buffers, see `move_biases`.
    verdict: on the step.
  """
  step = lambda p, u: p + verdict.rate * u
  # Both outcomes are computed; a refused step keeps the old values.
  params = jax.tree.map(step, held.params, proposal.updates)
  buffers = move_biases(held.buffers, loads, verdict.bias_rate)
  keep = lambda new, old: jax.tree.map(
    lambda n, o: jnp.where(verdict.applied, n, o), new, old
  )
  return keep(Held(params, buffers, proposal.moments), held)


def moving(loads: dict, names: tuple) -> dict:
  """Returns the loads of routers that are trained; all for names ().

  A router is trained if its bias has one of `names` in its path.
  """
  path = lambda place: (*place.split('/'), 'ffn', 'router', 'bias')
  return {
    place: load
    for place, load in loads.items()
    if not names or any(name in path(place) for name in names)
  }


def move_biases(
  buffers: Any, loads: dict[str, jax.Array], rate: jax.Array
) -> Any:
  """Returns buffers with every router bias moved by its layer's load.

  Args:
    buffers: the model's buffers.
    loads: 'segments/i/j' or 'mtp/k/block' -> load [... E] of the global batch.
    rate: gamma.
  """
  moved = jax.tree.map(lambda b: b, buffers)  # a copy of the dicts
  for place, load in loads.items():
    node = moved
    for key in place.split('/'):
      node = node.get(int(key) if key.isdigit() else key, {})
    router = node.get('ffn', {}).get('router', {})
    if 'bias' in router:
      router['bias'] = updated_bias(router['bias'], load, rate)
  return moved
