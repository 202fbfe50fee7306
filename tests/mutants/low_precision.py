"""Bugs of caches in float8, of transfers and of what a schedule says."""

from tests.mutants.mutant import Mutant

_READING = 'deepseek_jax/model/attention/latent_reading.py'
_MLA = 'deepseek_jax/model/attention/mla.py'
_SCHEDULE = 'deepseek_jax/plan/schedule.py'
_CACHE_TEST = 'tests/infer/float8_cache_test.py'
_PAGED_TEST = 'tests/infer/paged_latents_test.py'
_SCHEDULE_TEST = 'tests/plan/schedule_test.py'

MUTANTS = (
  Mutant(
    'cached_float8_read_without_its_scales',
    _READING,
    '  c = dequantize(flat(held.c), flat(held.scales), dtype)\n',
    '  c = flat(held.c).astype(dtype)\n',
    (f'{_CACHE_TEST}::it_holds_and_reads_what_is_computed_by_hand',),
    'V3 section 3.3.2: a scale per 128 numbers',
  ),
  Mutant(
    'one_scale_for_a_whole_latent',
    _READING,
    '    c.reshape(-1, c.shape[-1]),\n    block=(1, GROUP),\n',
    '    c.reshape(-1, c.shape[-1]),\n    block=(1, c.shape[-1]),\n',
    (f'{_CACHE_TEST}::it_holds_and_reads_what_is_computed_by_hand',),
    'FlashMLA: four scales of a record of 656 bytes',
  ),
  Mutant(
    'kernel_of_decoding_without_scales',
    _MLA,
    "      scales=getattr(pages, 'scales', None),\n",
    '      scales=None,\n',
    (f'{_PAGED_TEST}::pages_in_float8_go_to_the_kernel_with_their_scales',),
    'bytes of float8 taken for numbers',
  ),
  Mutant(
    'planner_counts_a_float8_cache_as_bfloat16',
    'deepseek_jax/plan/memory.py',
    "fp8 if config.compute.cache == 'float8' else 2 * elements",
    '2 * elements',
    (f'{_CACHE_TEST}::an_engine_holds_what_the_planner_counts',),
    'the plan is of another run than the one that is started',
  ),
  Mutant(
    'prefixes_of_another_format',
    'deepseek_jax/infer/engine.py',
    ' {compute.cache} ',
    ' ',
    (f'{_CACHE_TEST}::prefixes_of_another_format_are_not_found',),
    'the salt holds what else must be equal: the dtype of the cache',
  ),
  Mutant(
    'a_synchronous_transfer_counts_as_hidden',
    _SCHEDULE,
    '    wait = max(0.0, done - self.clocks.compute)\n',
    '    wait = asynchronous * max(0.0, done - self.clocks.compute)\n',
    (f'{_SCHEDULE_TEST}::a_synchronous_one_is_exposed_wherever_it_stands',),
    'XLA makes a pair with nothing between it synchronous',
  ),
  Mutant(
    'two_transfers_have_a_link_each',
    _SCHEDULE,
    '    begin = max(self.clocks.compute, self.clocks.link)\n',
    '    begin = self.clocks.compute\n',
    (f'{_SCHEDULE_TEST}::two_at_a_time_share_the_link',),
    'the link is one',
  ),
  Mutant(
    'weights_kept_for_every_round_of_an_exchange',
    'deepseek_jax/parallel/rounds.py',
    'added = jax.checkpoint(perhaps)(more)',
    'added = jax.lax.cond(more > 0, jax.checkpoint(again), none)',
    ('tests/parallel/exchange_test.py::further_rounds_keep_the_experts',),
    "what a branch reads is stacked over a scan: V3's experts thrice a layer",
  ),
)
