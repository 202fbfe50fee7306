"""Bugs of ladders of ideas that make one idea look better than it is."""

from tests.mutants.mutant import Mutant

_REACH = 'deepseek_jax/record/reach.py'
_REACH_TEST = 'tests/record/reach_test.py'
_RUNGS = 'deepseek_jax/ladder/rungs.py'
_RUNGS_TEST = 'tests/ladder/rungs_test.py'
_TRIALS_TEST = 'tests/ladder/trials_test.py'

MUTANTS = (
  Mutant(
    'reference_without_an_error_of_its_own',
    _REACH,
    'moves = -(found.row(arm, x) - goal) / found.slope(arm, x)',
    'moves = -found.row(arm, x) / found.slope(arm, x)',
    (f'{_REACH_TEST}::equals_numpy',),
    'an interval of one curve alone, where two curves are compared',
    fast=True,
  ),
  Mutant(
    'scatter_without_degrees_of_freedom',
    _REACH,
    'float(np.sum((y - design @ values) ** 2)) / freedom',
    'float(np.sum((y - design @ values) ** 2)) / len(points)',
    (f'{_REACH_TEST}::an_interval_holds_the_truth',),
    'a curve through all of its points seems to be free of noise',
  ),
  Mutant(
    'two_ideas_in_one_step',
    _RUNGS,
    "      'model.moe.router.bias': True,",
    "      'model.moe.router.bias': True,\n"
    "      'model.moe.router.scoring': 'sigmoid',",
    (f'{_RUNGS_TEST}::neighbours_differ_in_the_named_change',),
    'balance without a loss was praised for what sigmoid gates had done',
  ),
  Mutant(
    'finer_experts_are_wider_together',
    _RUNGS,
    "'model.moe.width': s.ffn // s.top_k,",
    "'model.moe.width': s.coarser * s.ffn // s.top_k,",
    (f'{_RUNGS_TEST}::experts_of_a_token_are_as_wide',),
    'a mixture of experts compared with a dense model of half its compute',
  ),
  Mutant(
    'predicting_more_tokens_is_free',
    'deepseek_jax/plan/match.py',
    "'flops': lambda c: count_flops(c, seq_len, mtp=True).per_token,",
    "'flops': lambda c: count_flops(c, seq_len, mtp=False).per_token,",
    (f'{_TRIALS_TEST}::prediction_of_more_tokens_is_paid_for',),
    'published FLOPs leave multi-token prediction out; its training costs them',
  ),
)
