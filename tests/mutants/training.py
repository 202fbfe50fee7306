"""Bugs of the loss, the step, multi-token prediction, the data and files."""

from tests.mutants.mutant import Mutant

_TRAIN = 'deepseek_jax/train/step.py'
_OBJECTIVE = 'deepseek_jax/train/objective.py'
_MTP = 'deepseek_jax/model/mtp.py'
_FP8 = 'deepseek_jax/hf/fp8.py'
_PIPELINE = 'deepseek_jax/data/batches.py'
_TRAIN_TEST = 'tests/train/step_test.py'
_MTP_TEST = 'tests/model/mtp_test.py'
_FP8_TEST = 'tests/hf/fp8_test.py'
_PIPELINE_TEST = 'tests/data/batches_test.py'
_LORA_TEST = 'tests/model/lora_test.py'
_LOSS = f'{_TRAIN_TEST}::loss_and_gradient_equal_float64'

MUTANTS = (
  Mutant(
    'eh_proj_takes_the_hidden_state_first',
    _MTP,
    'x = [self.embed_norm(embedded), self.hidden_norm(hidden)]',
    'x = [self.hidden_norm(hidden), self.embed_norm(embedded)]',
    (f'{_LOSS}1',),
    'V2/V3 trap 8: checkpoints and the paper differ',
  ),
  Mutant(
    'mtp_reads_the_present_token',
    _MTP,
    'tokens=jnp.roll(ctx.tokens, -depth, axis=1)',
    'tokens=jnp.roll(ctx.tokens, 1 - depth, axis=1)',
    (f'{_MTP_TEST}::token_ahead_takes_the_place',),
    'V3 section 2.2: depth k reads the token k ahead',
    fast=True,
  ),
  Mutant(
    'mtp_crosses_documents',
    _MTP,
    'segments=jnp.where(same & inside, segments, 0)',
    'segments=jnp.where(inside, segments, 0)',
    (f'{_MTP_TEST}::token_ahead_takes_the_place',),
    'packed data stop at the end of a document',
  ),
  Mutant(
    'mtp_predicts_the_next_token',
    _OBJECTIVE,
    'shifted = jnp.roll(labels, -depth, axis=1)',
    'shifted = labels',
    (f'{_LOSS}1',),
    'V3 eq. 24: depth k predicts the token k + 1 ahead',
  ),
  Mutant(
    'mtp_loss_divided_by_its_own_tokens',
    _OBJECTIVE,
    "metrics['mtp_loss'] = extra / shares.denominator",
    "metrics['mtp_loss'] = extra / (inputs.weights[:, 1:].sum())",
    (f'{_TRAIN_TEST}::both_losses_divide_by_all_tokens',),
    'V2/V3 trap 8: the divisor is T',
  ),
  Mutant(
    'mtp_losses_added_up',
    _OBJECTIVE,
    'return total / max(len(states), 1)',
    'return total',
    (f'{_LOSS}1',),
    'V3 eq. 25: the mean over depths',
  ),
  Mutant(
    'balance_loss_left_out_of_the_loss',
    'deepseek_jax/train/layer_losses.py',
    "    loss += metrics['balance_loss']\n",
    '',
    (f'{_LOSS}0',),
    'MaxText lost its balance loss in a rewrite',
  ),
  Mutant(
    'first_token_of_the_next_document_predicted',
    _OBJECTIVE,
    'inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)',
    'inside = (segments[:, :-1] > 0) & (segments[:, 1:] > 0)',
    (f'{_LOSS}1',),
    'a document knows nothing of the one after it',
  ),
  Mutant(
    'micro_batches_weigh_alike',
    _TRAIN,
    'return loss_and_metrics(model, variables, micro | whole, shares, built)',
    'own = shares._replace(\n'
    '        denominator=cfg.batch.accumulate\n'
    '        * jnp.maximum(built.inputs(micro).weights.sum(), 1.0)\n'
    '      )\n'
    '      micro = micro | whole\n'
    '      return loss_and_metrics(model, variables, micro, own, built)',
    (f'{_TRAIN_TEST}::accumulation_changes_no_number',),
    'transformers 34191: gradient accumulation of unequal batches',
  ),
  Mutant(
    'biases_see_the_last_micro_batch',
    _TRAIN,
    '      return jax.tree.map(jnp.add, total, grad(state.params, micro)), '
    'None\n',
    '      new = grad(state.params, micro)\n'
    '      added = jax.tree.map(jnp.add, total, new)\n'
    "      added[1]['loads'] = new[1]['loads']\n"
    '      return added, None\n',
    (f'{_TRAIN_TEST}::accumulation_changes_no_number',),
    'V2/V3 trap 6: loads count the global batch',
  ),
  Mutant(
    'skipped_updates_applied',
    'deepseek_jax/train/update.py',
    'lambda n, o: jnp.where(verdict.applied, n, o), new, old',
    'lambda n, o: n, new, old',
    (f'{_TRAIN_TEST}::an_exploding_batch_changes_nothing',),
    'optax.apply_if_finite applies what it should skip in the end',
  ),
  Mutant(
    'moments_of_a_gradient_that_is_not_clipped',
    'deepseek_jax/train/update.py',
    'norm = jnp.where(verdict.applied, norm, 0.0)',
    'norm = jnp.where(verdict.applied, 0.0, norm)',
    (f'{_TRAIN_TEST}::stored_moments_are_those',),
    'the update is of the clipped gradient, and so are the moments',
  ),
  Mutant(
    'gate_looks_at_the_loss_alone',
    'deepseek_jax/train/gate.py',
    'ok = jnp.isfinite(seen).all()',
    'ok = jnp.isfinite(loss)',
    ('tests/train/gate_test.py::only_finiteness_is_judged',),
    'a finite loss can have a gradient that is not',
  ),
  Mutant(
    'norm_weights_decay',
    'deepseek_jax/train/optimizer.py',
    "len(axes) > 1 and 'tables' not in axes",
    "len(axes) > 0 and 'tables' not in axes",
    ('tests/train/optimizer_test.py::matrices_decay_and_norms_do_not',),
    'stacked norm weights look like matrices',
  ),
  Mutant(
    'an_end_of_text_begins_the_next_document',
    _PIPELINE,
    'starts[:, 1:] = tokens[:, :-1] == eos_id',
    'starts[:, 1:] = tokens[:, 1:] == eos_id',
    (f'{_PIPELINE_TEST}::segments_of_any_tokens',),
    'documents end with it',
    fast=True,
  ),
  Mutant(
    'positions_run_on_through_documents',
    _PIPELINE,
    '(index - first).astype(np.int32)',
    'index.astype(np.int32)',
    (f'{_PIPELINE_TEST}::segments_of_any_tokens',),
    'positions start anew in each document',
  ),
  Mutant(
    'float8_divided_by_its_scale',
    _FP8,
    'weight.astype(np.float32) * _spread(',
    'weight.astype(np.float32) / _spread(',
    (f'{_FP8_TEST}::scales_of_powers_of_two_are_read',),
    'V2/V3 trap 7: weight_scale_inv multiplies',
  ),
  Mutant(
    'float8_blocks_begin_at_the_part',
    _FP8,
    '(first + np.arange(n)) // b - first // b',
    'np.arange(n) // b',
    (f'{_FP8_TEST}::part_from_the_middle',),
    'V2/V3 trap 7: 576 rows have a ragged block',
  ),
  Mutant(
    'float8_powers_of_two_rounded_down',
    _FP8,
    'np.where(mantissa == 0.5, exponent - 1, exponent)',
    'exponent - 1',
    (f'{_FP8_TEST}::ue8m0_rounds_scales_up',),
    'V2/V3 trap 7: scales are rounded up',
  ),
  Mutant(
    'selection_bias_dropped_on_load',
    'deepseek_jax/hf/loading.py',
    '    array = _array(leaf, read, wanted, mesh, rules)\n',
    '    array = _array(leaf, read, wanted, mesh, rules)\n'
    "    if leaf.path[-1] == 'bias':\n"
    '      array = 0 * array\n',
    ('tests/hf/round_trip_test.py::float32_is_exact',),
    'a loader that calls the bias an unexpected key',
  ),
  Mutant(
    'selection_bias_rounded_on_load',
    'deepseek_jax/hf/loading.py',
    'wanted = jnp.float32 if leaf.full_precision else dtype',
    'wanted = dtype',
    ('tests/hf/round_trip_test.py::bfloat16_keeps_norms',),
    'the bias is float32 in every file',
  ),
  Mutant(
    'lora_scale_forgotten',
    'deepseek_jax/model/lora.py',
    'return self.alpha / self.rank',
    'return self.alpha',
    (f'{_LORA_TEST}::full_rank_equals',),
    'LoRA section 4.1: the product is scaled by alpha / rank',
  ),
  Mutant(
    'lora_trains_the_base_too',
    'deepseek_jax/train/config.py',
    'return dataclasses.replace(cfg, trainable=(lora.KEY,))',
    'return cfg',
    (f'{_LORA_TEST}::adapters_alone_move',),
    'LoRA section 4.1: W is frozen',
  ),
  Mutant(
    'lora_both_matrices_drawn',
    'deepseek_jax/model/lora.py',
    "'b': jnp.zeros(one.b, jnp.float32)",
    "'b': std * jax.random.normal(key, one.b, jnp.float32)",
    (f'{_LORA_TEST}::a_fresh_model_is',),
    'LoRA section 4.1: the product is zero at the beginning',
  ),
  Mutant(
    'export_leaves_adapters_out',
    'deepseek_jax/model/merging.py',
    'params = lora.folded(params, made, config.lora.scale)',
    'params = lora.plain(params)',
    (f'{_LORA_TEST}::merged_equals',),
    'LoRA section 4.1: deployed weights are W + B A',
  ),
)
