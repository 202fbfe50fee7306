"""Bugs of speculative decoding, and of caches that are gone back in."""

from tests.mutants.mutant import Mutant

_SPECULATION = 'deepseek_jax/infer/speculation.py'
_LAW = 'tests/infer/speculation_test.py::every_sequence_has_the_probability'
_REWIND = 'tests/model/rewind_test.py::guesses_leave_no_trace'
_GRAMMAR = (
  'tests/infer/drafting_test.py::tokens_under_a_grammar_are_those_of_plain'
  '_decoding'
)
_DRAFT = 'tests/model/drafting_test.py::drafts_of_right_tokens_equal_training'

MUTANTS = (
  Mutant(
    'acceptance_guarded_by_an_epsilon',
    _SPECULATION,
    'jnp.where(p >= q, p > 0, uniform[:, :k] * q < p)',
    'uniform[:, :k] < p / (q + 1e-9)',
    (f'{_LAW}_of_plain_draws2',),
    'Leviathan et al., algorithm 1: no guard',
  ),
  Mutant(
    'rejected_draft_replaced_from_the_whole_target',
    _SPECULATION,
    '(accepted < count)[:, None], jnp.maximum(p - q, 0), p)',
    '(accepted < count)[:, None], p, p)',
    (f'{_LAW}_of_plain_draws2',),
    'Leviathan et al., algorithm 1: the residual',
  ),
  Mutant(
    'a_rejected_draft_does_not_end_the_row',
    _SPECULATION,
    'accepted = jnp.cumprod(stays, axis=1, dtype=jnp.int32).sum(axis=1)\n'
    '  at = ',
    'accepted = stays.sum(axis=1, dtype=jnp.int32)\n  at = ',
    (f'{_LAW}_of_plain_draws10',),
    'Leviathan et al., algorithm 1: the first rejection',
  ),
  Mutant(
    'ring_without_room_for_wrong_guesses',
    'deepseek_jax/model/attention/shared_kv.py',
    '(batch, self.window + spare, self.head_dim)',
    '(batch, self.window, self.head_dim)',
    (f'{_REWIND}4',),
    'mlx-vlm#1225: a ring cannot be rewound by dropping rows',
  ),
  Mutant(
    'remainder_without_room_for_wrong_guesses',
    'deepseek_jax/model/attention/compressor.py',
    '(batch, self.reach + spare, self.series, self.dim)',
    '(batch, self.reach, self.series, self.dim)',
    (f'{_REWIND}6',),
    'V4 remainders are state, too',
  ),
  Mutant(
    'drafting_without_its_cache',
    'deepseek_jax/model/network.py',
    'state, past, _ = module(state, self.embedded(ctx.tokens), ctx, past)',
    'state, *_ = module(state, self.embedded(ctx.tokens), ctx)',
    (f'{_DRAFT}0',),
    'vllm#55605: 1 to 2 % of drafts accepted',
  ),
  Mutant(
    'every_draft_under_the_mask_of_the_first_place',
    'deepseek_jax/infer/checked_drafts.py',
    '[draws.allowed[:, None], foreseen.allowed], axis=1',
    '[draws.allowed[:, None]] * (1 + drafts), axis=1',
    (_GRAMMAR,),
    'a grammar goes on with each token',
  ),
  Mutant(
    'a_grammar_that_keeps_the_drafts_it_read_ahead',
    'deepseek_jax/infer/host_arrays.py',
    'matcher = one.matcher.copy()',
    'matcher = one.matcher',
    (_GRAMMAR,),
    'what is read ahead may be rejected',
  ),
)
