"""Bugs of post-training: objectives, masks, replay, distillation, verifiers."""

from tests.mutants.mutant import Mutant

_POLICY = 'deepseek_jax/rl/policy.py'
_GRPO = 'deepseek_jax/rl/grpo.py'
_ADVANTAGES = 'deepseek_jax/rl/advantages.py'
_LOG_PROBS = 'deepseek_jax/rl/log_probs.py'
_ROUTER = 'deepseek_jax/model/experts/router.py'
_POLICY_TEST = 'tests/rl/policy_test.py'
_OBJECTIVES_TEST = 'tests/rl/objectives_test.py'
_ROUNDS = 'deepseek_jax/run/rl.py'
_ROUNDS_TEST = 'tests/run/rounds_test.py'
_REPLAY_TEST = 'tests/model/experts/replay_test.py'

MUTANTS = (
  Mutant(
    'unbiased_kl_without_the_gradient_of_its_ratio',
    _POLICY,
    "return ratio * k3 if kind == 'ratio_k3' else k3",
    "return jax.lax.stop_gradient(ratio) * k3 if kind == 'ratio_k3' else k3",
    (f'{_POLICY_TEST}::on_policy_values_agree',),
    'trl 6503: on-policy the value is that of k3, and the gradient is not',
    fast=True,
  ),
  Mutant(
    'off_policy_mask_drops_the_divergence_too',
    _POLICY,
    '    objective -= cfg.kl_weight * kl\n',
    '    objective -= kept * cfg.kl_weight * kl\n',
    (f'{_POLICY_TEST}::loss_and_gradient_norm',),
    'V3.2 section 3.1: M multiplies the policy term alone',
  ),
  Mutant(
    'off_policy_mask_in_the_denominator',
    _POLICY,
    '  objective, kl = kept * surrogate, None\n',
    '  tokens = tokens._replace(mask=tokens.mask * kept)\n'
    '  on = tokens.mask > 0\n'
    '  objective, kl = kept * surrogate, None\n',
    (f'{_POLICY_TEST}::mask_leaves_the_divergence',),
    'trl 4689: a first version put it into the loss mask',
  ),
  Mutant(
    'off_policy_mask_reads_the_old_policy',
    _POLICY,
    'gap = jnp.where(jnp.isnan(tokens.sampler), 0, tokens.sampler - policy)',
    'gap = tokens.old - policy',
    (f'{_POLICY_TEST}::reads_the_sampler',),
    'V3.2 section 3.1: pi_old is what the inference engine returned',
  ),
  Mutant(
    'sequence_means_divide_by_padding',
    _POLICY,
    '  count = answer_sums(mask, answers)\n'
    '  return mask / jnp.where(count > 0, count, 1)\n',
    '  count = answer_sums(jnp.ones_like(mask), answers)\n'
    '  return mask / jnp.where(count > 0, count, 1)\n',
    (f'{_POLICY_TEST}::order_padding_and_micro_batches',),
    'trl 7024: a sum whose length depended on the padding of the batch',
  ),
  Mutant(
    'log_probs_divided_by_the_temperature',
    _LOG_PROBS,
    '    logits = float32_logits(h, head) / temperature\n',
    '    logits = jax.nn.log_softmax(float32_logits(h, head))\n'
    '    logits = logits / temperature\n'
    '    logits -= jnp.log(temperature)\n'
    '    return (\n'
    '      jnp.take_along_axis(logits, labels[:, None], -1)[:, 0],\n'
    '      jnp.zeros(len(labels)),\n'
    '    )\n',
    (f'{_OBJECTIVES_TEST}::loss_is_that_of_numpy',),
    'prime-rl 697: the temperature belongs into the softmax',
  ),
  Mutant(
    'sampled_token_not_kept',
    _LOG_PROBS,
    '      keep |= labels[:, None] == jnp.arange(V)\n',
    '',
    (f'{_OBJECTIVES_TEST}::only_kept_tokens_share',),
    'a token outside the kept set would have the log-prob -inf',
  ),
  Mutant(
    'equal_rewards_divided_by_rounding',
    _ADVANTAGES,
    'known = _varied(rewards)[:, None] & ~np.isnan(rewards)',
    'known = ~np.isnan(rewards)',
    ('tests/rl/advantages_test.py::equal_rewards_give_exactly',),
    'r - mean(r) may be 1e-17, and the deviation no larger',
  ),
  Mutant(
    'deviation_of_the_population',
    _ADVANTAGES,
    "count - (cfg.std == 'sample')",
    'count',
    ('tests/rl/advantages_test.py::of_each_convention',),
    'TRL, verl and tunix divide by G - 1',
  ),
  Mutant(
    'replayed_experts_keep_live_weights',
    _ROUTER,
    '        # Live scores weigh, so the router learns.\n'
    '        weights = weigh(scores, experts, self.cfg)\n',
    '',
    (f'{_REPLAY_TEST}::learns_from_live_scores',),
    'weights of other experts than those that compute',
  ),
  Mutant(
    'replay_is_one_layer_late',
    'deepseek_jax/model/network.py',
    'ctx.routes[:, :, start:end]',
    'jnp.roll(ctx.routes, 1, axis=2)[:, :, start:end]',
    (f'{_REPLAY_TEST}::its_own_choice',),
    'routes are numbered by layers with experts, dense ones left out',
  ),
  Mutant(
    'reverse_kl_is_the_forward_one',
    'deepseek_jax/rl/distill.py',
    '  if beta == 1:\n    return kl(student, teacher)\n',
    '  if beta == 1:\n    return kl(teacher, student)\n',
    ('tests/rl/distill_test.py::gradient_of_the_reverse',),
    'V4: on-policy distillation is KL(student || teacher)',
  ),
  Mutant(
    'prompt_is_learnt_too',
    'deepseek_jax/rl/sft.py',
    "return read._replace(weights=read.weights * batch['trained'][:, 1:])",
    'return read',
    (f'{_OBJECTIVES_TEST}::mean_over_what_is_marked',),
    'Megatron-Bridge 3927: an all-ones mask without a word',
  ),
  Mutant(
    'answers_numbered_by_segment_ids',
    _GRPO,
    '  return documents(inputs.segments)\n',
    '  return jnp.maximum(inputs.segments, 0)\n',
    (f'{_OBJECTIVES_TEST}::numbers_of_segments_mean',),
    'a run of equal ids is a document; the same id may come again',
  ),
  Mutant(
    'mask_shifted_by_one',
    'deepseek_jax/rl/sft.py',
    "batch['trained'][:, 1:]",
    "batch['trained'][:, :-1]",
    (f'{_OBJECTIVES_TEST}::mean_over_what_is_marked',),
    'trl 6879: the mask belongs to the label',
  ),
  Mutant(
    'end_of_the_turn_not_checked',
    'deepseek_jax/rl/chats.py',
    '  if turn.answer[-1] not in ends:\n',
    '  if False and turn.answer[-1] not in ends:\n',
    ('tests/rl/examples_test.py::template_that_teaches_wrongly',),
    'trl 5988: a model that never stops',
  ),
  Mutant(
    'countdown_reuses_numbers',
    'deepseek_jax/rl/grading/verifiers.py',
    'return float(used == given and _value',
    'return float(set(used) <= set(given) and _value',
    ('tests/rl/grading_test.py::countdown',),
    'every number is used exactly once',
  ),
  Mutant(
    'verifier_error_is_a_zero',
    'deepseek_jax/rl/grading/worker.py',
    "return {'error': f'{reward.kind}: {type(error).__name__}: {told}'}",
    'scores.append(0.0)',
    ('tests/rl/judge_test.py::each_fault_costs_one',),
    'verl 5635: a broad except made every answer wrong',
  ),
  Mutant(
    'pass_at_k_draws_with_replacement',
    'deepseek_jax/posttrain/measure.py',
    'return 1 - math.comb(draws - right, k) / math.comb(draws, k)',
    'return 1 - (1 - right / draws) ** k',
    ('tests/posttrain/measure_test.py::pass_at_k_counts',),
    'arXiv:2107.03374, section 2.1: biased, it is below the true value',
  ),
  Mutant(
    'rejection_sampling_rejects_nothing',
    'deepseek_jax/posttrain/collect.py',
    'good = scored.right[place] & scored.shaped[place] & scored.whole[place]',
    'good = scored.shaped[place] & scored.whole[place]',
    ('tests/posttrain/measure_test.py::shortest_right_answer',),
    'open-r1: traces were kept before they were verified',
  ),
  Mutant(
    'cold_start_reads_heldout_problems',
    'deepseek_jax/posttrain/r1.py',
    'train = list(tasks.read(str(task)).train)',
    'train = [*tasks.read(str(task)).heldout, *tasks.read(str(task)).train]',
    ('tests/posttrain/r1_test.py::heldout_prompts_are_never',),
    'contamination: the bar of every figure that is reported',
  ),
  Mutant(
    'a_stage_counts_before_it_has_ended',
    'deepseek_jax/posttrain/chain.py',
    '  made = stage.run()\n',
    "  write(folder / _STAGES / f'{stage.name}.json', {'number': number})\n"
    '  made = stage.run()\n',
    ('tests/posttrain/chain_test.py::what_has_ended',),
    'a killed stage must be run again',
  ),
  Mutant(
    'earlier_levels_are_not_replayed',
    'deepseek_jax/posttrain/evolve.py',
    'some = newest.read_text().splitlines()',
    'some = []',
    ('tests/posttrain/evolve_test.py::lesson_has_its_level',),
    'a model that climbs forgets the levels below',
  ),
  Mutant(
    'permuted_rewards_stay_in_their_group',
    'deepseek_jax/run/rl.py',
    '.permuted(places)',
    '.permuted(places, axis=1)',
    ('tests/posttrain/permuted_test.py::dealt_over_all_groups',),
    'within a group the mean reward of a prompt would still teach',
  ),
  Mutant(
    'ratio_without_the_old_policy',
    _ROUNDS,
    '      if several:  # of one',
    '      if False:  # of one',
    (f'{_ROUNDS_TEST}::old_policy_is_that_of',),
    'torchforge 571: the ratio was 1 whatever had been learnt since',
  ),
  Mutant(
    'redraws_ask_the_same_prompts',
    _ROUNDS,
    '      self._place, errors = self._place + lack, errors + wrong\n',
    '      errors = errors + wrong\n',
    (f'{_ROUNDS_TEST}::equal_rewards_are_drawn_again',),
    'a group whose rewards are equal would be drawn for ever',
  ),
  Mutant(
    'long_wrong_answers_make_a_group_differ',
    'deepseek_jax/rl/rollout.py',
    '  differ = varied(rewards, cfg)\n',
    '  differ = made.varied\n',
    ('tests/rl/rollout_test.py::length_penalty_makes_no',),
    'DAPO, equation 11: groups are judged by what is right',
  ),
  Mutant(
    'samples_teach_the_layers_before_prediction',
    'deepseek_jax/model/network.py',
    '    state = alone(state)\n',
    '',
    ('tests/rl/objectives_test.py::sampled_teaches_prediction_alone',),
    'with rollouts this is imitation of every answer, wrong ones too',
  ),
  Mutant(
    'samples_teach_the_head_of_prediction',
    'deepseek_jax/rl/grpo.py',
    '    head = jax.lax.stop_gradient(predictions.head)\n',
    '    head = predictions.head\n',
    ('tests/rl/objectives_test.py::sampled_teaches_prediction_alone',),
    'the head is that of the policy',
  ),
  Mutant(
    'routes_of_the_token_after',
    'deepseek_jax/infer/outcomes.py',
    'sound, start = drawn.sound[row, :count], one.cached\n',
    'sound, start = drawn.sound[row, :count], one.cached + 1\n',
    ('tests/infer/recorded_test.py::those_of_the_training_model',),
    'experts belong to the token that is read, not to the one that is drawn',
  ),
  Mutant(
    'kept_tokens_before_the_cut',
    'deepseek_jax/infer/sampler.py',
    'kept_tokens.packed(target > -jnp.inf)',
    'kept_tokens.packed(raw > -jnp.inf)',
    ('tests/infer/recorded_test.py::what_the_cuts_left',),
    'trl 6945: the ratio is off by the mass that survives the cut',
  ),
  Mutant(
    'frozen_prediction_blocks_decay',
    'deepseek_jax/train/config.py',
    'return frozen.still(rule, still) if still else rule',
    'return rule',
    (f'{_OBJECTIVES_TEST}::keep_every_bit',),
    'no gradient reaches them, but weight decay does',
  ),
  Mutant(
    'router_biases_move_in_reinforcement',
    'deepseek_jax/train/step.py',
    '    loads = loads if built.moves_biases else {}\n',
    '',
    (f'{_OBJECTIVES_TEST}::keep_every_bit',),
    'prime-rl 2953: replayed counts drift the bias without a use',
  ),
)
