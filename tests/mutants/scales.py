"""Bugs of numbers whose size is free: gradients, moments, norms."""

from tests.mutants.mutant import Mutant

_MATMUL = 'pallas_kernels/grouped_matmul/__init__.py'
_NORMS = 'deepseek_jax/train/gradient_norms.py'
_MOE_TEST = 'tests/model/experts/moe_test.py'
_LINEAR = f'{_MOE_TEST}::float8_gradients_have_one_error'

MUTANTS = (
  Mutant(
    'gradients_of_rows_meet_the_floor_of_activations',
    _MATMUL,
    'g = quantized or quantize(grad, power_of_two=True, impl=impl)',
    'g = quantize(grad, power_of_two=True, floor=ACTIVATION_FLOOR, impl=impl)',
    (_LINEAR,),
    'slime 2256: float8 gradients vanish in large batches',
  ),
  Mutant(
    'gradients_of_weights_meet_the_floor_of_activations',
    _MATMUL,
    'over_rows(grad))',
    'over_rows(grad, floor=ACTIVATION_FLOOR))',
    (_LINEAR,),
    'slime 2256: float8 gradients vanish in large batches',
  ),
  Mutant(
    'gradients_on_a_wire_meet_the_floor_of_activations',
    'deepseek_jax/parallel/wires.py',
    'return _carried(grad, offsets, wire, wire.dispatch, False), None',
    'return _carried(grad, offsets, wire, wire.dispatch, False, 1e-4), None',
    ('tests/parallel/exchange_test.py::float8_wires_floor_tokens',),
    'the gradient of a combine is a dispatch, but no activation',
  ),
  Mutant(
    'a_block_of_zeros_has_no_scale',
    'pallas_kernels/quantize/reference.py',
    'max(floor, FP8_MAX * LEAST_SCALE)',
    'floor',
    ('tests/pallas_kernels/quantize_test.py::the_ends_of_float32',),
    'lmdeploy 3652: 0 / 0 in blocks of zeros',
  ),
  Mutant(
    'muon_divides_by_a_norm_that_underflows',
    'deepseek_jax/train/muon.py',
    'x = x * gain(jnp.abs(x).max(axis=(-2, -1), keepdims=True))',
    'x = 1.0 * x',
    ('tests/train/muon_test.py::a_direction_has_no_scale',),
    'KellerJordan/Muon 65: experts without gradients',
  ),
  Mutant(
    'clipping_adds_an_eps_to_the_norm',
    'deepseek_jax/train/optimizer.py',
    'g * factor * share',
    'g / (norm + 1e-6) * limit',
    (
      'tests/train/optimizer_test.py::a_clipped_gradient_scales_with_its_limit',
    ),
    'torch.nn.utils.clip_grad_norm_ does so',
  ),
  Mutant(
    'squares_of_a_gradient_underflow',
    _NORMS,
    'jnp.square(a * wide(a))',
    '(jnp.square(a) * jnp.square(wide(a)))',
    ('tests/train/gradient_norms_test.py::follows_every_scale',),
    'a norm of 0 is never clipped',
  ),
  Mutant(
    'a_maximum_without_nan_is_a_norm_of_zero',
    _NORMS,
    'return root / jnp.where(factor > 0, factor, 1.0)',
    'return jnp.where(factor > 0, root / factor, 0.0)',
    ('tests/train/gradient_norms_test.py::no_nan_is_lost',),
    'XLA on CPUs leaves NaN out of the maximum of many numbers',
  ),
  Mutant(
    'quotient_rule_squares_a_sum_of_weights',
    'pallas_kernels/router/reference.py',
    '(change - out * change.sum(axis=-1, keepdims=True)) / total',
    'change / total - weights * change.sum(-1, keepdims=True) / total**2',
    ('tests/model/experts/router_test.py::no_logit_makes_a_gradient',),
    'V4: sqrt(softplus(-150)) has a NaN gradient',
  ),
  Mutant(
    'sequence_loss_divides_by_scores_that_underflowed',
    'deepseek_jax/model/experts/balance.py',
    '_mean_over_valid(shares(scores), valid)',
    '_mean_over_valid(\n'
    '    scores / scores.sum(axis=-1, keepdims=True), valid\n  )',
    ('tests/model/experts/balance_test.py::scores_that_underflow',),
    'Megatron-LM adds 1e-20 there',
  ),
  Mutant(
    'an_infinite_deviation_stays_in_the_gate',
    'deepseek_jax/train/gate.py',
    'jnp.minimum(error * (seen - mean), most)',
    'error * (seen - mean)',
    ('tests/train/gate_test.py::a_huge_norm_in_the_warm_up',),
    'inf - inf: every later step is refused',
  ),
  Mutant(
    'two_moments_planned_for_muon',
    'deepseek_jax/train/optimizer.py',
    'return 1 if cfg.muon is not None and muon.split(axes) is not None else 2',
    'return 2',
    ('tests/plan/audit_test.py::bytes_equal_those_of_the_real_state',),
    'V4 algorithm 1: one momentum',
  ),
)
