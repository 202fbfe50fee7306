"""Bugs of distillation by samples and by states, and of evaluation."""

from tests.mutants.mutant import Mutant

_DISTILL = 'deepseek_jax/rl/distill.py'
_HARVEST = 'deepseek_jax/rl/harvest.py'
_ANSWERING = 'deepseek_jax/rl/answering.py'
_CHOICES = 'deepseek_jax/evaluation/choices.py'
_DISTILL_TEST = 'tests/rl/distill_test.py'
_CHOICES_TEST = 'tests/evaluation/choices_test.py'

MUTANTS = (
  Mutant(
    'pass_at_k_by_the_mean',
    'deepseek_jax/evaluation/estimates.py',
    'wrong = Fraction(math.comb(n - right, k), math.comb(n, k))',
    'wrong = (1 - Fraction(right, n)) ** k',
    ('tests/evaluation/estimates_test.py::share_of_subsets',),
    'arXiv:2107.03374, section 2.1: 1 - (1 - p)^k of a mean is biased',
    fast=True,
  ),
  Mutant(
    'teachers_states_by_the_head_of_another',
    _DISTILL,
    '(states.swapaxes(0, 1), heads, parts)',
    '(states.swapaxes(0, 1), heads[::-1], parts)',
    (f'{_DISTILL_TEST}::several_teachers_add_up',),
    'V4: each teacher has its own head',
  ),
  Mutant(
    'teachers_state_one_token_late',
    _DISTILL,
    "hidden = batch['teacher_hidden'][:, :-1]",
    "hidden = batch['teacher_hidden'][:, 1:]",
    (f'{_DISTILL_TEST}::states_of_another_width',),
    'TRL: labels and logits of GKD must be aligned by the caller',
  ),
  Mutant(
    'logits_of_all_tokens_at_once',
    _DISTILL,
    '  chunk: int = 1024,\n',
    '  chunk: int = 1 << 20,\n',
    (f'{_DISTILL_TEST}::logits_of_a_chunk_alone',),
    'spec 7.6: never materialise [B, T, V] twice',
  ),
  Mutant(
    'unfinished_answers_are_kept',
    _HARVEST,
    'right = [one for one in scored if one.right and one.whole]',
    'right = [one for one in scored if one.right]',
    ('tests/rl/harvest_test.py::without_an_end_is_counted',),
    'an answer that was cut teaches an end that it did not have',
  ),
  Mutant(
    'failed_verifier_is_a_wrong_answer',
    _ANSWERING,
    'return Scored(answer.tokens, text, whole, None, None, verdict.error)',
    'return Scored(answer.tokens, text, whole, 0.0, False, verdict.error)',
    ('tests/evaluation/passing_test.py::failing_verifier_leaves',),
    'verl 5635: a broad except made every answer wrong',
  ),
  Mutant(
    'seeds_of_problems_overlap',
    _ANSWERING,
    'request(self.prompts[place], seed + cfg.n * i, self._stops, cfg)',
    'request(self.prompts[place], seed + i, self._stops, cfg)',
    ('tests/evaluation/passing_test.py::what_the_answers_make',),
    'answers of one problem would be drawn as those of the next',
  ),
  Mutant(
    'choices_behind_their_own_prefix',
    _CHOICES,
    '  start = min(_common(alone, ids) for ids in whole)\n',
    '  start = len(alone)\n',
    (f'{_CHOICES_TEST}::tokens_that_join',),
    'lm-eval: a merge over the border moves what is scored',
  ),
  Mutant(
    'choices_scored_one_token_late',
    _CHOICES,
    "batch['scored'][:, 1:],",
    "batch['scored'][:, :-1],",
    (f'{_CHOICES_TEST}::log_probs_make_by_hand',),
    'the mask belongs to the label',
  ),
)
