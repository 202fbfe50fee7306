"""Bugs of what a CPU gets: options, dtypes, weights held once, top-k."""

from tests.mutants.mutant import Mutant

_PREPARED = 'deepseek_jax/infer/prepared.py'
_PREPARED_TEST = 'tests/infer/prepared_test.py'
_CANDIDATES = 'deepseek_jax/model/attention/candidates.py'
_CANDIDATES_TEST = 'tests/model/attention/candidates_test.py'
_PRODUCTS = 'deepseek_jax/parallel/products.py'
_PRODUCTS_TEST = 'tests/parallel/products_test.py'

MUTANTS = (
  Mutant(
    'donated_weights_stay',
    _PREPARED,
    '      _delete(leaf)\n    return',
    '    return',
    (f'{_PREPARED_TEST}::two_copies', f'{_PREPARED_TEST}::one_copy'),
    'a server held its weights twice for life',
  ),
  Mutant(
    'shared_weights_deleted_early',
    _PREPARED,
    '    if donate and not uses[id(leaf)]:',
    '    if True:',
    (f'{_PREPARED_TEST}::there_twice',),
    'tied arrays are one array at two places',
  ),
  Mutant(
    'candidate_groups_by_score',
    _CANDIDATES,
    '  groups = _of_all(tops, k)\n',
    '  groups = jax.lax.top_k(tops, k)[1]\n',
    (f'{_CANDIDATES_TEST}::equals_one_level',),
    'equals then go to whichever group is best, not to the lowest place',
  ),
  Mutant(
    'last_chunk_not_scored',
    _CANDIDATES,
    'jnp.minimum(last // CHUNK + 1, S // CHUNK)',
    'jnp.minimum(last // CHUNK, S // CHUNK)',
    (f'{_CANDIDATES_TEST}::those_of_all_scores',),
    'a query must see its own chunk of keys',
  ),
  Mutant(
    'products_rounded_before_they_are_added',
    _PRODUCTS,
    'preferred_element_type=jnp.float32',
    'preferred_element_type=jnp.bfloat16',
    (f'{_PRODUCTS_TEST}::of_float64', f'{_PRODUCTS_TEST}::bfloat16_result'),
    'XLA 0.10 on a CPU with AMX: slow, and a sum stands still at 256',
  ),
  Mutant(
    'options_of_training_for_decoding',
    'deepseek_jax/parallel/processor.py',
    "  if chosen is not None and program in ('train', 'prefill'):",
    '  if chosen is not None:',
    ('tests/parallel/processor_test.py::place_of_the_tables',),
    'without its fusions batched decoding was slower',
    fast=True,
  ),
  Mutant(
    'resumed_run_chooses_anew',
    'deepseek_jax/run/chosen.py',
    '  if written is None:\n',
    '  if True:\n',
    ('tests/run/chosen_test.py::first_machine_chose',),
    'a run that moves to another processor would change its dtype',
  ),
)
