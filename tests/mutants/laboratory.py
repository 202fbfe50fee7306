"""Bugs of comparisons, mixtures and sweeps that make a conclusion wrong."""

from tests.mutants.mutant import Mutant

_COMPARISON = 'deepseek_jax/record/comparison.py'
_COMPARISON_TEST = 'tests/record/comparison_test.py'
_BATCHES = 'deepseek_jax/data/batches.py'
_SOURCES_TEST = 'tests/data/sources_test.py'
_REPORT = 'deepseek_jax/record/report'
_REPORT_TEST = 'tests/record/report_test.py'

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
  Mutant(
    'report_takes_texts_for_markup',
    f'{_REPORT}/page.py',
    'autoescape=True',
    'autoescape=False',
    (f'{_REPORT_TEST}::text_of_others_stays_text',),
    'a sample of the model becomes an element of the page',
  ),
  Mutant(
    'report_runs_any_script',
    f'{_REPORT}/templates/base.html.jinja',
    "script-src 'sha256-{{ script_hash }}'",
    "script-src 'unsafe-inline'",
    (f'{_REPORT_TEST}::run_the_pages_script_alone',),
    "one text that is not escaped would run in the reader's browser",
  ),
  Mutant(
    'map_of_experts_upside_down',
    f'{_REPORT}/heatmaps.py',
    'tick._replace(place=round(100 - tick.place, 3))',
    'tick._replace(place=round(tick.place, 3))',
    (f'{_REPORT_TEST}::heatmap_pixels_are_the_loads',),
    'the first layer is read as the last',
  ),
  Mutant(
    'ticks_that_read_alike',
    f'{_REPORT}/ticks.py',
    'if all(abs(a - b) <= near for a, b in zip(back, numbers)):',
    'if len(back) == len(numbers):',
    (f'{_REPORT_TEST}::any_axis_has_ticks_that_differ',),
    'all ticks of a loss that hardly moves say the same number',
  ),
)
