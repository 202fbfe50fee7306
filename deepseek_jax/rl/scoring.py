"""Scores sampled tokens by the trainer's own forward, against the sampler.

Legend: R rows, S tokens of a row, T = S - 1, L MoE layers, K chosen experts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.stacks import moe_statistics
from deepseek_jax.model.transformer import Model, Output
from deepseek_jax.parallel import processor
from deepseek_jax.rl import log_probs
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.train.objective import Inputs, next_token


def scorer(
  model: Model, cfg: GRPOConfig, place: Any = None
) -> Callable[[Mapping, Mapping[str, Any]], jax.Array]:
  """Returns (variables, batch) -> log-probs [R S] of the tokens that learn.

  By the trainer's own forward, of the distribution that was sampled from; 0
  elsewhere. It gives a batch its 'old' and, with other weights, 'reference'.

  Args:
    model: that learns.
    cfg: the objective.
    place: sharding of what it returns, on a mesh.
  """

  def run(variables: Mapping, batch: Mapping[str, jax.Array]) -> jax.Array:
    inputs = next_token(batch)
    routes = batch['routes'][:, :-1] if cfg.keep_routing else None
    out = _applied(model, variables, inputs, routes)
    kept = batch['kept'][:, 1:] if cfg.keep_sampling_mask else None
    said, _ = log_probs.sampled(
      out.hidden,
      model.head(variables),
      inputs.labels,
      batch['trained'][:, 1:] * inputs.weights,
      temperature=cfg.temperature,
      kept=kept,
    )
    return jnp.pad(said, ((0, 0), (1, 0)))  # the first token has none

  how = processor.options('train', model.config.compute.xla)
  return jax.jit(run, out_shardings=place, compiler_options=how)


def router(
  model: Model, place: Any = None
) -> Callable[[Mapping, Mapping[str, Any]], jax.Array]:
  """Returns (variables, batch) -> experts [R T L K] of the live routers.

  Args:
    model: with experts.
    place: sharding of what it returns, on a mesh.
  """

  def run(variables: Mapping, batch: Mapping[str, jax.Array]) -> jax.Array:
    out = _applied(model, variables, next_token(batch), None)
    return moe_statistics(out.aux, 'experts').transpose(1, 2, 0, 3)

  how = processor.options('train', model.config.compute.xla)
  return jax.jit(run, out_shardings=place, compiler_options=how)


def _applied(
  model: Model, variables: Mapping, inputs: Inputs, routes: jax.Array | None
) -> Output:
  """Returns what the model makes of inputs, as a training step applies it."""
  return model.apply(
    variables,
    inputs.tokens,
    positions=inputs.positions,
    segment_ids=inputs.segments,
    train=True,
    routes=routes,
  )


def mismatch(batch: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns how far the sampler is from the trainer, of a batch with 'old'.

  The largest and the mean gap of a token's log-prob. In one program with equal
  weights both are rounding.
  """
  on = (batch['trained'] > 0) & (batch['positions'] > 0)
  on &= ~np.isnan(batch['sampler'])
  gap = np.abs(batch['sampler'][on] - batch['old'][on])
  return {
    'mismatch_most': float(gap.max(initial=0)),
    'mismatch_mean': float(gap.mean()) if gap.size else 0.0,
  }


def differing(routes: np.ndarray, live: np.ndarray) -> dict[str, float]:
  """Returns of each layer the share of tokens whose experts differ.

  Args:
    routes: [R T L K], that the sampler's routers chose; -1 where not known.
    live: [R T L K], that the trainer's choose. In any order.
  """
  known = (routes >= 0).all(axis=-1)
  other = (np.sort(routes, axis=-1) != np.sort(live, axis=-1)).any(axis=-1)
  return {
    f'differing_experts/{layer}': float(
      other[..., layer][known[..., layer]].mean()
      if known[..., layer].any()
      else 0.0
    )
    for layer in range(routes.shape[2])
  }
