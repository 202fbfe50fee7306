"""Routing: gate logits to the experts of each token and their weights.

One computation with settings: DeepSeekMoE and V2-Lite (greedy softmax), V2
(group-limited softmax, arXiv:2405.04434 section 2.2.2), V3 (sigmoid with a
selection bias, arXiv:2412.19437 section 2.1.2), V4 (square root of softplus).
The bias moves the choice and never the weight. Legend: N tokens, E experts,
K chosen, G groups.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.router import reference
from pallas_kernels.router.reference import Rule, normalized

__all__ = ['Rule', 'normalized', 'router']


def router(
  logits: jax.Array,
  bias: jax.Array | None = None,
  *,
  top_k: int,
  rule: Rule,
  impl: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chooses top_k experts per token; lower numbers win ties.

  Args:
    logits: [N E] float32 gate logits.
    bias: [E] float32 or None, added to the scores for the choice alone.
    top_k: K.
    rule: see Rule.
    impl: None, 'reference' or 'gpu' (float32, E a multiple of 8 up to 512,
      up to 16 groups of 416 experts in all, K as shared memory allows: 170 of
      256 experts in groups).

  Returns:
    experts [N K] int32, best first; weights [N K] float32; counts [E] int32,
    the tokens that chose each expert. The weights are differentiable in
    logits; the choice and the bias have no gradient. With nan among a token's
    logits its experts are valid all the same. To the kernel nan is the best
    score, so it shows in the weights; in XLA's top_k its sign decides.

  Raises:
    ValueError: a rule that doesn't fit E and top_k.
    NotImplementedError: impl='gpu' for a shape that the kernel can't take.
  """
  _check(logits, bias, top_k, rule)
  if bias is not None:
    bias = jax.lax.stop_gradient(jnp.asarray(bias, jnp.float32))
  return _route(logits, bias, top_k, rule, dispatch.chosen(impl))


def _check(
  logits: jax.Array, bias: jax.Array | None, top_k: int, rule: Rule
) -> None:
  """Raises ValueError for a rule that doesn't fit E and top_k."""
  E = logits.shape[-1]
  if rule.scoring not in ('softmax', 'sigmoid', 'sqrtsoftplus'):
    raise ValueError(
      f"scoring={rule.scoring!r}; use 'softmax', 'sigmoid' or 'sqrtsoftplus'"
    )
  if rule.group_score not in ('max', 'top2'):
    raise ValueError(f"group_score={rule.group_score!r}; use 'max' or 'top2'")
  if E % rule.groups or not 1 <= rule.top_groups <= rule.groups:
    raise ValueError(
      f'groups={rule.groups} with top_groups={rule.top_groups} do not fit '
      f'{E} experts: groups divides E, and 1 <= top_groups <= groups'
    )
  size = E // rule.groups
  if rule.groups > 1 and rule.group_score == 'top2' and size < 2:
    raise ValueError(f"group_score='top2' needs groups of 2, not of {size}")
  if not 1 <= top_k <= size * rule.top_groups:
    raise ValueError(
      f'top_k={top_k} is outside 1..{size * rule.top_groups}, the experts '
      f'of {rule.top_groups} groups'
    )
  if bias is not None and bias.shape != (E,):
    raise ValueError(f'bias is {list(bias.shape)}, not [{E}]')


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _route(
  logits: jax.Array,
  bias: jax.Array | None,
  top_k: int,
  rule: Rule,
  impl: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns experts, weights and counts; the weights have a gradient."""

  def gpu(*args: Any) -> tuple:
    from pallas_kernels.router import gpu

    return gpu.route(*args)

  args = (logits, bias, top_k, rule)
  functions = {'reference': reference.route, 'gpu': gpu}
  return dispatch.run('router', impl, functions, *args)


def _fwd(
  logits: jax.Array,
  bias: jax.Array | None,
  top_k: int,
  rule: Rule,
  impl: str | None,
) -> tuple:
  """Returns the result and what the backward pass keeps."""
  out = _route(logits, bias, top_k, rule, impl)
  return out, (logits, out[0], bias)


def _bwd(
  top_k: int, rule: Rule, impl: str | None, saved: tuple, grads: tuple
) -> tuple:
  """Returns the logits' gradient through the weights of the chosen."""
  logits, experts, bias = saved
  _, pull = jax.vjp(lambda x: reference.weigh(x, experts, rule), logits)
  zero = None if bias is None else jnp.zeros_like(bias)
  return *pull(grads[1]), zero


_route.defvjp(_fwd, _bwd)
