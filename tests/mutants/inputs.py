"""Bugs of what a caller's ids and numbers mean."""

from tests.mutants.mutant import Mutant

_CONTEXT = 'deepseek_jax/model/context.py'
_LOSSES = 'deepseek_jax/train/cross_entropy.py'
_CONFIG = 'deepseek_jax/config.py'
_INPUTS_TEST = 'tests/model/given_test.py'
_LOSSES_TEST = 'tests/train/cross_entropy_test.py'
_CONFIG_TEST = 'tests/config_test.py'
_NUMBERS_TEST = 'tests/config_numbers_test.py'

MUTANTS = (
  Mutant(
    'ids_below_0_count_from_the_end',
    'deepseek_jax/model/lookup.py',
    'index = jnp.where(index < 0, table.shape[0], index)',
    'index = jnp.asarray(index)',
    (f'{_INPUTS_TEST}::lookup_gives_no_other_row',),
    'jax 3774: -1 is the last token',
    fast=True,
  ),
  Mutant(
    'ids_outside_the_vocabulary_are_clipped',
    'deepseek_jax/model/lookup.py',
    'return table.at[index].get(mode=mode, fill_value=fill)',
    "return table.at[index].get(mode='clip')",
    (f'{_INPUTS_TEST}::lookup_gives_no_other_row',),
    'jax 16899: the embedding of the last token',
  ),
  Mutant(
    'a_segment_id_that_comes_again_goes_on',
    _CONTEXT,
    '  segments = documents(segments)\n',
    '',
    (f'{_INPUTS_TEST}::comes_again_is_another_document0',),
    'packers reuse ids; attentions that compare them leak',
  ),
  Mutant(
    'what_padding_holds_is_read',
    _CONTEXT,
    'tokens = jnp.where(real | ((tokens >= 0) & (tokens < vocab)), tokens, 0)',
    'tokens = jnp.asarray(tokens)',
    (f'{_INPUTS_TEST}::padding_may_hold_anything0',),
    '-100 on padding made NaN of the row',
  ),
  Mutant(
    'padding_is_trained_on',
    'deepseek_jax/train/objective.py',
    'inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)',
    'inside = segments[:, 1:] == segments[:, :-1]',
    (f'{_INPUTS_TEST}::it_weighs_nothing',),
    'segment 0 was trained on with cross_document',
  ),
  Mutant(
    'an_ignored_label_is_not_a_number',
    _LOSSES,
    'return jnp.where(part[1] == IGNORED, 0.0, said)',
    'return jnp.where(part[1] == IGNORED, jnp.nan, said)',
    (f'{_LOSSES_TEST}::of_an_ignored_label_is_0',),
    'NaN times a weight of 0 stays NaN',
  ),
  Mutant(
    'a_label_outside_the_vocabulary_has_logit_0',
    _LOSSES,
    'return jnp.where(weights == 0, 0.0, _or_nan(weights, labels, vocab))',
    'return weights',
    (f'{_LOSSES_TEST}::label_outside_the_vocabulary_is_named_or_nan',),
    'the loss is then logsumexp alone',
  ),
  Mutant(
    'chunks_are_divisors',
    _LOSSES,
    'chunks = max(1, -(-N // devices // size))',
    'first = max(1, -(-N // size))\n'
    '  chunks = next(c for c in range(first, N + 1) if N % c == 0)',
    (f'{_LOSSES_TEST}::chunks_are_as_few_as_fit',),
    '8191 tokens were 8191 chunks',
  ),
  Mutant(
    'numbers_that_are_not_are_taken',
    _CONFIG,
    'if not -largest <= value <= largest:',
    'if value < -largest or value > largest:',
    (f'{_NUMBERS_TEST}::what_no_run_could_use_is_refused',),
    'NaN is neither too small nor too large',
    fast=True,
  ),
  Mutant(
    'every_change_is_checked_by_itself',
    'deepseek_jax/config_changes.py',
    '  return changed_by(config, changes.items())\n',
    '  for pair in changes.items():\n'
    '    config = changed_by(config, [pair])\n'
    '  return config\n',
    (f'{_CONFIG_TEST}::the_result_is_checked',),
    'top_k and experts could not be changed together',
  ),
)
