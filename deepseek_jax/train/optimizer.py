"""Builds AdamW as in the V3 recipe (arXiv:2412.19437, 3.3 and 4.2), or Muon.

Master weights are float32; the moments may be stored in bfloat16. Under AdamW
only matrices decay: norm weights do not (the papers are silent; it is the
custom). With `muon` it has the matrices, and AdamW the rest (see muon.py).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deepseek_jax.config import above, at_least, name_dtypes, within
from deepseek_jax.train import muon
from deepseek_jax.train.gradient_norms import gain, tree_norm
from deepseek_jax.train.muon import MuonConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Describes how gradients become updates.

  Attributes:
    beta1, beta2, eps, decay: AdamW's.
    clip: greatest global gradient norm.
    moments: dtype in which they are stored.
    muon: what matrices get; None: AdamW.
    table_rate: how much faster the rows of n-gram tables learn, of which a
      step reads few (Engram, arXiv:2601.07372: 5, and no decay).
  """

  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  decay: float = 0.1
  clip: float = 1.0
  moments: Literal['float32', 'bfloat16'] = 'float32'
  muon: MuonConfig | None = None
  table_rate: float = 5.0

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    name_dtypes(self, 'moments')
    within(self, beta1=(0, 1), beta2=(0, 1), ends='[)')
    above(self, eps=0, table_rate=0)
    at_least(self, decay=0)
    if self.clip != math.inf:  # which never clips; 0 would leave no gradient
      above(self, clip=0)


def stored_in(
  dtype: jnp.dtype, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns `inner` in float32, its floating-point state stored in `dtype`."""

  def cast(tree: Any, to: Any) -> Any:
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(to) if floating(x) else x, tree)

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = inner.update(grads, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  init = lambda params: cast(inner.init(params), dtype)
  return optax.GradientTransformation(init, update)


def clipped(limit: float) -> optax.GradientTransformationExtraArgs:
  """Scales gradients so that their norm is at most `limit`.

  `norm` is that of the whole gradient, of which a pipeline stage has a part;
  left out, it is that of what is given.
  """

  def update(
    grads: Any,
    state: Any,
    params: Any = None,
    *,
    norm: jax.Array | None = None,
    **more: Any,
  ) -> tuple[Any, Any]:
    del params, more
    norm = tree_norm(grads) if norm is None else norm
    # Near 1 first: limit / norm may underflow. No division by element, which
    # XLA would store for all that reads it.
    factor = gain(norm)
    near = jnp.where(norm * factor == 0, 1.0, norm * factor)
    share = limit / near
    one = lambda g: jnp.where(norm < limit, g, g * factor * share)
    return jax.tree.map(one, grads), state

  return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _where(holds: Callable[[tuple], bool], abstract: nnx.State) -> dict:
  """Returns whether `holds` is true of each parameter's axis names."""
  one = lambda v: v.replace(holds(v.get_metadata()['axes']))
  leaf = lambda v: isinstance(v, nnx.Variable)
  return nnx.to_pure_dict(jax.tree.map(one, abstract, is_leaf=leaf))


def tables(abstract: nnx.State) -> dict:
  """Returns True for the rows of n-gram (Engram) tables, else False."""
  return _where(lambda axes: 'tables' in axes, abstract)


def matrices(abstract: nnx.State) -> dict:
  """Returns True for parameters of two or more axes.

  Stacked layers add no axis, and n-gram tables are no matrices.
  """
  return _where(lambda axes: len(axes) > 1 and 'tables' not in axes, abstract)


def faster_tables(
  cfg: OptimizerConfig, abstract: nnx.State
) -> optax.GradientTransformation:
  """Returns a scaling of n-gram table updates by `table_rate`.

  A model without such tables gets the identity.
  """
  mask = tables(abstract)
  if not any(jax.tree.leaves(mask)):
    return optax.identity()
  return optax.masked(optax.scale(cfg.table_rate), mask)


def adamw(
  cfg: OptimizerConfig, abstract: nnx.State
) -> optax.GradientTransformationExtraArgs:
  """Returns AdamW's update direction for a learning rate of 1, sign included.

  Args:
    cfg: the recipe.
    abstract: the model's abstract parameters.
  """
  moments = optax.scale_by_adam(cfg.beta1, cfg.beta2, cfg.eps)
  if cfg.moments != 'float32':
    moments = stored_in(jnp.dtype(cfg.moments), moments)
  return optax.chain(
    clipped(cfg.clip),
    moments,
    optax.add_decayed_weights(cfg.decay, mask=matrices(abstract)),
    faster_tables(cfg, abstract),
    optax.scale(-1.0),
  )


def with_muon(
  cfg: OptimizerConfig, abstract: nnx.State
) -> optax.GradientTransformationExtraArgs:
  """Returns `adamw` with Muon for the matrices; `cfg.muon` is not None."""
  # Muon and Adam share one state: a matrix has one moment, the rest two.
  how = muon.splits(abstract)
  adam = (cfg.beta1, cfg.beta2, cfg.eps)
  moments = muon.scale_by_muon(cfg.muon, adam, how)
  if cfg.moments != 'float32':
    moments = stored_in(jnp.dtype(cfg.moments), moments)
  is_split = lambda s: s is None or isinstance(s, muon.Split)
  mine = jax.tree.map(lambda s: s is not None, how, is_leaf=is_split)
  # AdamW's decay: embedding and head, and vectors if asked; never tables.
  others = jax.tree.map(
    lambda split, matrix, table: (
      not split and not table and (matrix or cfg.muon.vectors)
    ),
    mine,
    matrices(abstract),
    tables(abstract),
  )
  return optax.chain(
    clipped(cfg.clip),
    moments,
    optax.add_decayed_weights(cfg.muon.decay, mask=mine),
    optax.add_decayed_weights(cfg.decay, mask=others),
    faster_tables(cfg, abstract),
    optax.scale(-1.0),
  )


def moment_count(cfg: OptimizerConfig, axes: tuple) -> int:
  """Returns how many moments a parameter with these axis names has."""
  return 1 if cfg.muon is not None and muon.split(axes) is not None else 2


def update_rule(
  cfg: OptimizerConfig, abstract: nnx.State
) -> optax.GradientTransformationExtraArgs:
  """Returns the update direction of `cfg` for a learning rate of 1."""
  return adamw(cfg, abstract) if cfg.muon is None else with_muon(cfg, abstract)
