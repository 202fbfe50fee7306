"""Bugs of compressed attention, its router, its streams, and of Muon."""

from tests.mutants.mutant import Mutant

_COMPRESSOR = 'deepseek_jax/model/attention/compressor.py'
_WINDOWS = 'pallas_kernels/compress/reference.py'
_SHARED = 'deepseek_jax/model/attention/shared_kv.py'
_PARTS = 'deepseek_jax/model/attention/partial_softmax.py'
_READING = 'deepseek_jax/model/attention/csa_entries.py'
_STREAMS = 'deepseek_jax/model/hyper_connections.py'
_ROUTER = 'deepseek_jax/model/experts/router.py'
_MUON = 'deepseek_jax/train/muon.py'
_SHARED_TEST = 'tests/model/attention/shared_kv_test.py'
_STREAMS_TEST = 'tests/model/hyper_connections_test.py'
_ROUTING_TEST = 'tests/model/experts/hash_routing_test.py'
_MUON_TEST = 'tests/train/muon_test.py'

MUTANTS = (
  Mutant(
    'an_entry_visible_one_token_late',
    _COMPRESSOR,
    'count = (ctx.positions + 1) // ratio',
    'count = ctx.positions // ratio',
    (f'{_SHARED_TEST}::chunks_equal_one_pass',),
    'V4 trap 2: floor((t + 1) / m)',
  ),
  Mutant(
    'an_entry_visible_before_its_window_ends',
    _COMPRESSOR,
    'so_far = jnp.cumsum(ends, axis=1)\n  new =',
    'so_far = jnp.cumsum(jnp.roll(ends, -1, axis=1), axis=1)\n  new =',
    (f'{_SHARED_TEST}::nothing_before_a_changed_token_changes',),
    'V4 trap 2: floor((t + 1) / m)',
  ),
  Mutant(
    'compressor_series_exchanged',
    _WINDOWS,
    'value, logit = _window(kv, gate, bias, at, -1)',
    'value, logit = _window(kv, gate, bias, at, 0)',
    (f'{_SHARED_TEST}::equals_float64_and_documents',),
    'V4 trap 1: the second half is the window of the entry itself',
  ),
  Mutant(
    'compressor_softmax_over_channels',
    _WINDOWS,
    '(jax.nn.softmax(logit, axis=2) * value).sum(axis=2)',
    '(jax.nn.softmax(logit, axis=3) * value).sum(axis=2)',
    (f'{_SHARED_TEST}::equals_float64_and_documents',),
    'V4 section 2.3: over the tokens, channel by channel',
  ),
  Mutant(
    'compressor_without_position_bias',
    _WINDOWS,
    'pick(gate) + bias[:, series]',
    'pick(gate)',
    (f'{_SHARED_TEST}::equals_float64_and_documents',),
    'V4 section 2.3: ape is added to the gate',
  ),
  Mutant(
    'windows_overlap_across_documents',
    _COMPRESSOR,
    '    there &= same == tokens.segments[rows, jnp.maximum(end, 0)]\n',
    '',
    (
      'tests/model/attention/compressor_test.py::is_compressed_as_if_it_were_alone',
    ),
    'V4 section 3.4: each document compresses from its own start',
  ),
  Mutant(
    'one_rope_table_for_all_layers',
    _SHARED,
    "return self.rope if self.compress == 'none' else self.compress_rope",
    'return self.rope',
    (f'{_SHARED_TEST}::equals_float64_and_documents',),
    'V4 trap 3: layers with entries turn all by 160000 and YaRN',
  ),
  Mutant(
    'mscale_inferred_for_v4',
    _SHARED,
    '    attention_factor=1.0,\n',
    '    attention_factor=None,\n',
    ('tests/presets/v4_presets_test.py::rope_has_two_bases_and_no_mscale',),
    'V4 trap 3: transformers would infer 1.277',
  ),
  Mutant(
    'output_not_turned_back',
    _SHARED,
    'y = tail_rope(y, -positions, self.cfg.layer_rope, self.cfg.rope_dim)',
    'y = y + 0',
    (f'{_SHARED_TEST}::equals_float64_and_documents',),
    'V4 trap 4: values carry the turn of their place',
  ),
  Mutant(
    'sinks_left_out',
    _PARTS,
    'jnp.concatenate([logs, sinks[None]])',
    'jnp.concatenate([logs, sinks[None] - 1e9])',
    (f'{_SHARED_TEST}::parts_join_to_one_softmax',),
    'V4 section 2.3: a sink takes its share',
    fast=True,
  ),
  Mutant(
    'window_one_token_wider',
    _PARTS,
    'seen = (ahead >= 0) & (ahead < window)',
    'seen = (ahead >= -1) & (ahead < window)',
    (f'{_SHARED_TEST}::window_blocks_equal_a_mask',),
    'V4: 128 tokens, the own one included',
  ),
  Mutant(
    'query_heads_not_normed',
    _SHARED,
    'q = (wide * jax.lax.rsqrt(mean + self.cfg.norm_eps)).astype(q.dtype)',
    'q = q + 0 * mean.astype(q.dtype)',
    (f'{_SHARED_TEST}::equals_float64_and_documents',),
    'V4 has a norm per head, V4.1 has not',
  ),
  Mutant(
    'gates_of_sqrtsoftplus_without_their_root',
    _ROUTER,
    '    root = jnp.sqrt(jax.nn.softplus(jnp.where(low, 0.0, logits)))',
    '    root = jax.nn.softplus(jnp.where(low, 0.0, logits))',
    (f'{_ROUTING_TEST}::scores_are_the_root_of_softplus',),
    'V4: the root of softplus',
  ),
  Mutant(
    'hash_routed_weights_not_normalized',
    _ROUTER,
    '      weights = weigh(scores, experts, self.cfg)\n    else:\n',
    '      weights = jnp.take_along_axis(scores, experts, axis=-1)\n'
    '    else:\n',
    (f'{_ROUTING_TEST}::token_chooses_and_its_scores_weigh',),
    'V4: gates are divided by their sum and scaled',
  ),
  Mutant(
    'swiglu_not_clamped',
    'deepseek_jax/model/experts/ffn.py',
    'gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)',
    'gate, up = jnp.minimum(gate, limit), jnp.minimum(up, limit)',
    (f'{_ROUTING_TEST}::gate_is_clamped_above',),
    'V4: the gate above, the other on both sides',
    fast=True,
  ),
  Mutant(
    'shared_expert_not_clamped',
    'deepseek_jax/model/experts/moe.py',
    'shared = FFNConfig(cfg.shared * F, cfg.limit)',
    'shared = FFNConfig(cfg.shared * F)',
    (f'{_ROUTING_TEST}::routed_and_shared_experts_both',),
    "V4: DeepSeek's first reference upload",
  ),
  Mutant(
    'streams_mixed_by_the_transpose',
    _STREAMS,
    "'BTjD,BTjk->BTkD'",
    "'BTkD,BTjk->BTjD'",
    (f'{_STREAMS_TEST}::comb_is_applied_from_the_first_index',),
    'V4 trap 6: the mix uses the transpose of M',
  ),
  Mutant(
    'sinkhorn_ends_on_rows',
    'pallas_kernels/sinkhorn/reference.py',
    'return _divide(_divide(m, -1, eps), -2, eps), None',
    'return _divide(_divide(m, -2, eps), -1, eps), None',
    (f'{_STREAMS_TEST}::columns_are_convex_and_rows_nearly',),
    'V4 trap 6: Sinkhorn ends on columns',
  ),
  Mutant(
    'hyper_connections_start_at_scale_1',
    _STREAMS,
    'self.scale = _constant(rngs, np.full(3, cfg.alpha))',
    'self.scale = _constant(rngs, np.full(3, 1.0))',
    (f'{_STREAMS_TEST}::starts_as_the_paper_does',),
    "V4 trap 6: transformers' scale of 1 is no recipe",
  ),
  Mutant(
    'teacher_over_entries_alone',
    _READING,
    'mass = -jax.nn.softplus(rest - log_sum)',
    'mass = 0 * (rest - log_sum)',
    (f'{_SHARED_TEST}::indexers_loss_and_recall_equal',),
    'Megatron-LM: a head that spends 1 % on entries weighed as one that spends'
    ' all',
  ),
  Mutant(
    'teacher_without_sinks',
    'deepseek_jax/model/attention/shared_reading.py',
    'rest=jnp.logaddexp(parts[0].log_sum, sinks)',
    'rest=parts[0].log_sum',
    (f'{_SHARED_TEST}::a_head_teaches_by_what_it_spends',),
    'the softmax of the layer runs over window, entries and sink',
  ),
  Mutant(
    'teacher_underflows',
    _READING,
    'most = self.along.max_of_heads(mass.max(axis=-1, keepdims=True))',
    'most = self.along.max_of_heads(0 * mass.max(axis=-1, keepdims=True))',
    (f'{_SHARED_TEST}::a_head_teaches_by_what_it_spends',),
    '0 / 0 where all heads spend less than float32 has on entries',
  ),
  Mutant(
    'muon_takes_all_experts_as_one_matrix',
    'deepseek_jax/model/matrices.py',
    "_INDEPENDENT = ('experts', 'groups', 'series',",
    "_INDEPENDENT = ('groups', 'series',",
    (f'{_MUON_TEST}::each_expert_gate_and_up',),
    'V4 trap 12: each expert by itself',
  ),
  Mutant(
    'muon_of_one_coefficient_triple',
    _MUON,
    'self.rounds * (_DRIVE,) + self.settling * (_SETTLE,)',
    '(self.rounds + self.settling) * (_DRIVE,)',
    (f'{_MUON_TEST}::equals_float64_and_is_orthogonal',),
    'V4 trap 12: eight rounds of one, two of another',
  ),
)
