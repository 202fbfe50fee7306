"""AdamW as in the V3 recipe (arXiv:2412.19437 sections 3.3 and 4.2).

Master weights are float32; the moments may be stored in bfloat16. Only
matrices decay: norm weights do not (the papers do not say; it is the custom).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """beta1, beta2, eps, decay: AdamW's; clip: greatest global gradient norm."""

  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  decay: float = 0.1
  clip: float = 1.0
  moments: Literal['float32', 'bfloat16'] = 'float32'

  def __post_init__(self):
    for name in ('beta1', 'beta2'):
      if not 0 <= getattr(self, name) < 1:
        raise InputError(
          f'{name} = {getattr(self, name)}: must lie in 0..1, 1 excluded'
        )


def stored_in(
  dtype, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`inner` in float32, its floating-point state kept in `dtype`."""

  def cast(tree, to):
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(to) if floating(x) else x, tree)

  def update(grads, state, params=None):
    updates, state = inner.update(grads, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  init = lambda params: cast(inner.init(params), dtype)
  return optax.GradientTransformation(init, update)


def matrices(abstract: nnx.State) -> dict:
  """True for each parameter of two or more axes; stacking adds none."""
  one = lambda v: v.replace(len(v.get_metadata()['axes']) > 1)
  leaf = lambda v: isinstance(v, nnx.Variable)
  return nnx.to_pure_dict(jax.tree.map(one, abstract, is_leaf=leaf))


def adamw(
  cfg: OptimizerConfig, abstract: nnx.State
) -> optax.GradientTransformation:
  """The update direction for a learning rate of 1; sign included.

  Args:
    cfg: the recipe.
    abstract: the model's abstract parameters.
  """
  moments = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
  if cfg.moments != 'float32':
    moments = stored_in(jnp.dtype(cfg.moments), moments)
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip),
    moments,
    optax.add_decayed_weights(cfg.decay, mask=matrices(abstract)),
    optax.scale(-1.0),
  )
