"""Bugs of the router, the experts and what balances them."""

from tests.mutants.mutant import Mutant

_ROUTER = 'deepseek_jax/model/experts/router.py'
_MOE = 'deepseek_jax/model/experts/moe.py'
_CAPACITY = 'deepseek_jax/model/experts/capacity.py'
_BALANCE = 'deepseek_jax/model/experts/balance.py'
_ROUTER_TEST = 'tests/model/experts/router_test.py'
_MOE_TEST = 'tests/model/experts/moe_test.py'
_BALANCE_TEST = 'tests/model/experts/balance_test.py'

MUTANTS = (
  Mutant(
    'masked_groups_score_0',
    _ROUTER,
    'jnp.where(keep[..., None], grouped, -jnp.inf)',
    'jnp.where(keep[..., None], grouped, 0.0)',
    (f'{_ROUTER_TEST}::negative_biased_scores',),
    'transformers 45440',
    fast=True,
  ),
  Mutant(
    'bias_in_the_weights',
    _ROUTER,
    'return experts, weigh(scores, experts, cfg)',
    'return experts, weigh(choice, experts, cfg)',
    (f'{_ROUTER_TEST}::bias_moves_the_choice',),
    'V2/V3 trap 4: gate weights never contain the bias',
  ),
  Mutant(
    'bias_left_out_of_the_choice',
    _ROUTER,
    '  if bias is not None:\n    choice',
    '  if bias is None:\n    choice',
    (f'{_ROUTER_TEST}::bias_moves_the_choice',),
    'a router bias dropped on load looks like this',
  ),
  Mutant(
    'groups_of_v3_by_their_best_expert',
    _ROUTER,
    'rank = local.top_k(grouped, 2)[0].sum(axis=-1)',
    'rank = grouped.max(axis=-1)',
    (f'{_ROUTER_TEST}::v3_ranks_groups',),
    'V2/V3 trap 4: V3 adds the best two',
    fast=True,
  ),
  Mutant(
    'gates_not_normalized',
    _ROUTER,
    '  if cfg.normalize:\n',
    '  if False:\n',
    (f'{_ROUTER_TEST}::v3_ranks_groups',),
    'V2/V3 trap 5: V3 divides by the sum',
  ),
  Mutant(
    'gates_of_v2_normalized',
    _ROUTER,
    '  if cfg.normalize:\n',
    '  if True:\n',
    (f'{_ROUTER_TEST}::v2_ranks_groups',),
    'V2/V3 trap 5: V2 does not divide',
  ),
  Mutant(
    'gates_of_no_weight_divide_by_0',
    _ROUTER,
    'normalized(weights, Rule.eps)',
    'normalized(weights, 0.0)',
    (f'{_ROUTER_TEST}::all_zero_scores',),
    'the released code adds 1e-20',
  ),
  Mutant(
    'gates_not_scaled',
    _ROUTER,
    'return weights * cfg.scale',
    'return weights',
    (f'{_ROUTER_TEST}::v3_ranks_groups',),
    'V2/V3 trap 5: V3 times 2.5 after normalising',
  ),
  Mutant(
    'router_in_low_precision',
    _ROUTER,
    'x.astype(jnp.float32),\n      self.weight[...].astype(jnp.float32),',
    'x.astype(jnp.bfloat16),\n      self.weight[...].astype(jnp.bfloat16),',
    (f'{_ROUTER_TEST}::equals_a_loop_in_float64',),
    'bfloat16 scores tie and low experts win',
  ),
  Mutant(
    'padding_counts_in_the_load',
    _ROUTER,
    '    experts = jnp.where(valid[..., None], experts, nowhere)\n',
    '',
    (f'{_ROUTER_TEST}::padding_goes_nowhere',),
    'padding would move the router biases',
  ),
  Mutant(
    'gradient_reaches_the_bias',
    _ROUTER,
    'choice = jax.lax.stop_gradient(scores)\n  if bias is not None:\n'
    '    choice = choice + jax.lax.stop_gradient(bias)\n',
    'choice = jax.lax.stop_gradient(scores)\n  if bias is not None:\n'
    '    choice = choice + bias\n    scores = scores + 1e-3 * bias\n',
    (f'{_ROUTER_TEST}::no_gradient_reaches_the_bias',),
    'V3 section 2.1.2: the bias has no gradient',
  ),
  Mutant(
    'shared_expert_scaled',
    _MOE,
    'y = y + self.shared(x, ctx)[0]',
    'y = y + cfg.router.scale * self.shared(x, ctx)[0]',
    (f'{_MOE_TEST}::few_tokens_equal_the_loop_too',),
    'the routed scale is for routed experts',
  ),
  Mutant(
    'gate_and_up_exchanged',
    'deepseek_jax/model/experts/ffn.py',
    'return jax.nn.silu(gate) * up',
    'return gate * jax.nn.silu(up)',
    ('tests/model/experts/ffn_test.py::gate_comes_first',),
    'w1 is the gate, w3 is not',
  ),
  Mutant(
    'tokens_dropped_in_evaluation',
    _MOE,
    'if cfg.capacity and ctx.train:',
    'if cfg.capacity:',
    (f'{_MOE_TEST}::drops_in_training_and_never',),
    'V2 section 2.2.4: no dropping at evaluation',
  ),
  Mutant(
    'budget_of_a_micro_batch',
    _CAPACITY,
    'budget = cfg.factor * counts.sum(axis=1) / cfg.devices',
    'budget = cfg.factor * counts.sum() / cfg.devices / B * jnp.ones(B)',
    (
      f'{_MOE_TEST}::sequence_loses_the_same_alone',
      f'{_MOE_TEST}::drops_the_lowest_affinities',
    ),
    'what a call holds decides what is dropped: accumulation changes the loss',
  ),
  Mutant(
    'sequence_loss_0',
    _BALANCE,
    '  if cfg.sequence:\n',
    '  if not cfg.sequence:\n',
    (f'{_BALANCE_TEST}::a_weight_of_0_leaves',),
    'MaxText trained for months with a balance loss of 0',
  ),
  Mutant(
    'sequence_loss_of_raw_scores',
    _BALANCE,
    'f * _mean_over_valid(shares(scores), valid)',
    'f * _mean_over_valid(scores, valid)',
    (f'{_BALANCE_TEST}::sequence_loss_counts',),
    'V3 eq. 19: scores are normalised over the experts',
  ),
  Mutant(
    'communication_loss_averages_a_device',
    _BALANCE,
    'p = _mean_over_valid(routing.scores, valid)\n'
    '  p = p.reshape(p.shape[0], devices, -1).sum(axis=-1)\n'
    '  return (f * p).sum(axis=-1).mean()\n\n\ndef losses(',
    'p = _mean_over_valid(routing.scores, valid)\n'
    '  p = p.reshape(p.shape[0], devices, -1).mean(axis=-1)\n'
    '  return (f * p).sum(axis=-1).mean()\n\n\ndef losses(',
    (f'{_BALANCE_TEST}::v2_losses_count',),
    'V2 eq. 31: the shares of a device add up',
  ),
  Mutant(
    'bias_moves_towards_the_load',
    _BALANCE,
    'error = load.mean(axis=-1, keepdims=True) - load',
    'error = load - load.mean(axis=-1, keepdims=True)',
    (f'{_BALANCE_TEST}::moves_by_the_sign_alone',),
    'V2/V3 trap 6',
  ),
  Mutant(
    'bias_moves_by_the_size_of_the_error',
    _BALANCE,
    'return bias + rate * jnp.sign(error)',
    'return bias + rate * error',
    (f'{_BALANCE_TEST}::moves_by_the_sign_alone',),
    'V2/V3 trap 6: by the sign alone',
  ),
  Mutant(
    'bias_moves_at_the_mean',
    _BALANCE,
    'return bias + rate * jnp.sign(error)',
    'return bias + rate * jnp.where(error >= 0, 1.0, -1.0)',
    (f'{_BALANCE_TEST}::moves_by_the_sign_alone',),
    'V2/V3 trap 6: sign(0) is 0',
  ),
)
