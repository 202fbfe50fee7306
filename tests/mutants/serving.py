"""Bugs of engines: pages, rings, prefixes, draws and drafts."""

from tests.mutants.mutant import Mutant

_PAGING = 'deepseek_jax/infer/paging.py'
_PAGES = 'deepseek_jax/infer/pages.py'
_SCHEDULER = 'deepseek_jax/infer/scheduler.py'
_ENGINE = 'deepseek_jax/infer/engine.py'
_SAMPLER = 'deepseek_jax/infer/sampler.py'
_OUTCOMES = 'deepseek_jax/infer/outcomes.py'
_DRAFTING = 'deepseek_jax/infer/checked_drafts.py'
_SCHEDULER_TEST = 'tests/infer/scheduler_test.py'
_ENGINE_TEST = 'tests/infer/engine_test.py'
_SAMPLER_TEST = 'tests/infer/sampler_test.py'
_PAGES_TEST = 'tests/infer/pages_test.py'
_DRAFTING_TEST = 'tests/infer/drafting_test.py'

MUTANTS = (
  Mutant(
    'stale_rows_of_a_page_are_read',
    _PAGING,
    '  return jnp.where(seen, flat, 0)\n',
    '  return flat\n',
    (f'{_ENGINE_TEST}::garbage_where_nothing_is_cached',),
    '0 times the NaN of an earlier request',
  ),
  Mutant(
    'entries_lie_in_the_page_where_they_begin',
    _PAGING,
    '  shift = _PROBE // ratio - less.shape[2] if ratio else 0\n',
    '  shift = 0\n',
    (f'{_ENGINE_TEST}::a_shared_prefix_changes_no_token',),
    'a block over a border depends on tokens that prefixes do not share',
  ),
  Mutant(
    'padding_writes_to_the_last_page',
    _PAGING,
    '  beyond = store.pages[0].shape[1] if store.pages else 0\n',
    '  beyond = -1\n',
    (f'{_ENGINE_TEST}::a_preempted_answer_is_the_undisturbed',),
    'negative indices wrap in JAX: the last page is corrupted',
  ),
  Mutant(
    'rings_of_the_slot_before',
    _PAGING,
    '  return jnp.where(begun, rings, 0)\n',
    '  return rings\n',
    (f'{_ENGINE_TEST}::garbage_where_nothing_is_cached',),
    'Rapid-MLX 1469: compressor state leaks between requests',
  ),
  Mutant(
    'a_prefix_without_its_rings',
    _ENGINE,
    '      if snapshot is not None:\n',
    '      if snapshot == -1:\n',
    (f'{_ENGINE_TEST}::a_shared_prefix_changes_no_token',),
    'ATOM 1417, sglang 30339: the window is missing behind a cached prefix',
  ),
  Mutant(
    'prefixes_of_old_weights',
    _SCHEDULER,
    '    self.pages.forget()\n',
    '',
    (f'{_ENGINE_TEST}::new_weights_are_used_at_once',),
    'AReaL 421: rollouts from a stale cache',
  ),
  Mutant(
    'tenants_share_prefixes',
    _PAGES,
    'hashlib.blake2b(salt.encode(), digest_size=16)',
    "hashlib.blake2b(b'', digest_size=16)",
    (f'{_PAGES_TEST}::a_hash_rests_on_all_tokens',),
    'cache_salt of vLLM: timing tells what others asked',
    fast=True,
  ),
  Mutant(
    'a_page_is_known_by_its_own_tokens',
    _PAGES,
    '    before = hashlib.blake2b(before + part, digest_size=16).digest()\n',
    '    before = hashlib.blake2b(part, digest_size=16).digest()\n',
    (f'{_PAGES_TEST}::a_hash_rests_on_all_tokens',),
    'equal pages behind different beginnings',
  ),
  Mutant(
    'a_page_is_known_without_the_token_after',
    _PAGES,
    'tokens[start : start + size]',
    'tokens[start : start + page]',
    (f'{_PAGES_TEST}::it_may_rest_on_the_token_after',),
    'a draft of one request rests on the token of another',
    fast=True,
  ),
  Mutant(
    'a_page_is_known_before_it_is_whole',
    _SCHEDULER,
    '(one.cached - self.ahead) // self.page',
    'full',
    (f'{_SCHEDULER_TEST}::a_page_that_rests_on_the_token_after',),
    'one that ends there leaves others a row that nobody writes',
    fast=True,
  ),
  Mutant(
    'answers_share_a_seed',
    _ENGINE,
    '      seed = int(request.sampling.seed) + index\n',
    '      seed = int(request.sampling.seed)\n',
    (f'{_ENGINE_TEST}::several_answers_share_their_prompt',),
    'n equal answers: a group without variance',
  ),
  Mutant(
    'top_p_before_temperature',
    _SAMPLER,
    '    probs = jax.nn.softmax(jnp.where(keep, ordered, -jnp.inf), axis=-1)\n',
    '    probs = jax.nn.softmax(\n'
    '      jnp.where(keep, ordered * temperature, -jnp.inf), axis=-1\n    )\n',
    (f'{_SAMPLER_TEST}::every_setting_is_transformers_own',),
    'tpu-inference cuts before the temperature',
  ),
  Mutant(
    'frequency_counts_the_prompt',
    _SAMPLER,
    '  times = count(answer)\n',
    '  times = count(there)\n',
    (f'{_SAMPLER_TEST}::every_setting_is_transformers_own',),
    'OpenAI counts what was generated alone',
  ),
  Mutant(
    'drafts_of_the_wrong_token',
    _DRAFTING,
    '  after = start[:, None] + 1 + waiting  # positions of the tokens after'
    ' each\n',
    '  after = start[:, None] + waiting\n',
    (f'{_DRAFTING_TEST}::drafts_stay_as_often_as_training_says',),
    'vLLM 55605: 1 to 2 % of drafts are accepted, the text is right',
  ),
  Mutant(
    'found_pages_are_given_away',
    _SCHEDULER,
    '      self.pages.share(found)\n'
    '      more = self.pages.take(self.pages_for(one.length) - len(found))\n',
    '      more = self.pages.take(self.pages_for(one.length) - len(found))\n'
    '      self.pages.share(found)\n',
    (f'{_SCHEDULER_TEST}::any_order_of_events',),
    'a prefix that nobody uses is evicted for the rest of its own prompt',
    fast=True,
  ),
  Mutant(
    'the_preempted_wait_at_the_end',
    _SCHEDULER,
    '    self.waiting.appendleft(one)\n',
    '    self.waiting.append(one)\n',
    (f'{_SCHEDULER_TEST}::any_order_of_events',),
    'whoever gave up its pages starves behind newer requests',
  ),
  Mutant(
    'scores_of_what_is_computed_again',
    _OUTCOMES,
    '  del one.scores[one.cached + 1 :]\n',
    '',
    (f'{_ENGINE_TEST}::echo_of_a_preempted_prompt',),
    'a preempted prompt is scored twice',
  ),
)
