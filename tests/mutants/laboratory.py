"""Bugs of comparisons, mixtures and sweeps that make a conclusion wrong."""

from tests.mutants.mutant import Mutant

_COMPARISON = 'deepseek_jax/record/comparison.py'
_COMPARISON_TEST = 'tests/record/comparison_test.py'
_BATCHES = 'deepseek_jax/data/batches.py'
_SOURCES_TEST = 'tests/data/sources_test.py'

MUTANTS = (
  Mutant(
    'difference_of_seeds_that_are_no_pairs',
    _COMPARISON,
    'interval([mine[seed] - first[seed] for seed in both])',
    'interval([mine[a] - first[b] for a, b in zip(both, both[::-1])])',
    (f'{_COMPARISON_TEST}::paired_by_seed',),
    'what one seed does was taken for what the arm does',
    fast=True,
  ),
  Mutant(
    'normal_interval_of_three_seeds',
    _COMPARISON,
    'float(stdtrit(n - 1, 0.975))',
    'float(stdtrit(1e9, 0.975))',
    (f'{_COMPARISON_TEST}::an_interval_is_students',),
    '1.96 deviations where three seeds have 4.30: noise looks like a result',
  ),
  Mutant(
    'mixture_forgets_its_shares',
    _BATCHES,
    'self.drawn = [int(n) for n in drawn]',
    'self.drawn = [0 for n in drawn]',
    (f'{_SOURCES_TEST}::a_resumed_stream_goes_on',),
    'a resumed run tells other shares of its sources than it has read',
  ),
  Mutant(
    'every_epoch_is_cut_alike',
    _BATCHES,
    'epoch = index // len(self._windows) if self._recut else 0',
    'epoch = 0',
    (f'{_SOURCES_TEST}::keeps_its_windows',),
    'the token behind a border never has context before it',
  ),
  Mutant(
    'arms_matched_in_stored_parameters',
    'deepseek_jax/plan/match.py',
    "'active_params': lambda c: count_parameters(c).active,",
    "'active_params': lambda c: count_parameters(c).total,",
    ('tests/cli/arms_test.py::active_parameters_are_those_of_a_token',),
    'a mixture of experts that stores as much computes far less',
  ),
)
