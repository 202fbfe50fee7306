"""The second half of a step: from gradients to the next variables.

The whole batch is judged once, by its loss and the norm of its gradient; then
every part of a model is updated by itself, all of it or one pipeline stage.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax import schedules
from deepseek_jax.gate import GateState, judge
from deepseek_jax.layers.balance import updated_bias
from deepseek_jax.recipe import TrainConfig


class Held(NamedTuple):
  """What an update changes, of a model or of a part of it."""

  params: Any
  buffers: Any
  moments: Any


class Verdict(NamedTuple):
  """What all parts of a model must know of a step.

  Attributes:
    norm: of the whole gradient.
    applied: whether the update is.
    rate: learning rate.
    bias_rate: gamma of the router biases.
  """

  norm: jax.Array
  applied: jax.Array
  rate: jax.Array
  bias_rate: jax.Array


def tokens_seen(state, length: int) -> jax.Array:
  """float32, tokens before this step, of sequences of `length`."""
  return state.sequences.astype(jnp.float32) * length


def judged(
  cfg: TrainConfig, state, loss: jax.Array, norm: jax.Array, length: int
) -> tuple[Verdict, GateState, dict]:
  """What becomes of a step.

  Args:
    cfg: the recipe.
    state: before the step; `step`, `sequences` and `gate` are read.
    loss: of the global batch.
    norm: of its gradient.
    length: tokens of a sequence.

  Returns:
    The verdict, the gate's next state, and the metrics that tell of them.
  """
  tokens = tokens_seen(state, length)
  applied, gate = judge(cfg.gate, state.gate, loss, norm)
  verdict = Verdict(
    norm,
    applied,
    schedules.learning_rate(cfg.schedule, state.step, tokens, cfg.tokens),
    cfg.bias_rate.at(tokens, cfg.tokens),
  )
  metrics = {
    'grad_norm': norm,
    'learning_rate': verdict.rate,
    'applied': applied,
    'skipped': gate.skipped,
    'streak': gate.streak,
  }
  return verdict, gate, metrics


def updated(
  optimizer: optax.GradientTransformationExtraArgs,
  held: Held,
  grads,
  loads: dict[str, jax.Array],
  verdict: Verdict,
) -> Held:
  """The variables and moments after a step.

  Args:
    optimizer: of `recipe.optimizer_of`.
    held: before the step.
    grads: shaped as held.params.
    loads: of the routers in held.buffers, see `move_biases`.
    verdict: on the step.
  """
  updates, moments = optimizer.update(
    grads, held.moments, held.params, norm=verdict.norm
  )
  params = jax.tree.map(lambda p, u: p + verdict.rate * u, held.params, updates)
  buffers = move_biases(held.buffers, loads, verdict.bias_rate)
  keep = lambda new, old: jax.tree.map(
    lambda n, o: jnp.where(verdict.applied, n, o), new, old
  )
  return keep(Held(params, buffers, moments), held)


def moving(loads: dict, names: tuple) -> dict:
  """The loads of routers whose bias has one of `names` in its path; (): all."""
  path = lambda place: (*place.split('/'), 'ffn', 'router', 'bias')
  return {
    place: load
    for place, load in loads.items()
    if not names or any(name in path(place) for name in names)
  }


def move_biases(buffers, loads, rate):
  """Buffers with every router bias moved by its layer's load.

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
