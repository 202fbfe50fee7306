"""Bugs of caches in float8, of transfers and of what a schedule says."""

from tests.mutants.mutant import Mutant

_READING = 'deepseek_jax/model/attention/latent_reading.py'
_MLA = 'deepseek_jax/model/attention/mla.py'
_SCHEDULE = 'deepseek_jax/plan/schedule.py'
_CACHE_TEST = 'tests/infer/float8_cache_test.py'
_PAGED_TEST = 'tests/infer/paged_latents_test.py'
_INDEXER = 'deepseek_jax/model/attention/indexer.py'
_INDEX_TEST = 'tests/infer/float8_index_test.py'
_OP_TEST = 'tests/pallas_kernels/indexer_test.py'
_SCHEDULE_TEST = 'tests/plan/schedule_test.py'
_SWIGLU_TEST = 'tests/pallas_kernels/swiglu_quantize_test.py'
_TOKENS_TEST = 'tests/pallas_kernels/from_tokens_test.py'

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
    'index_keys_in_float8_score_without_their_scales',
    _INDEXER,
    '    own *= scales[:, None]\n',
    '    own *= 1.0\n',
    (f'{_INDEX_TEST}::choices_are_those_of_float64',),
    'V3.2, fp8_index: the scale of a key multiplies the sum over heads',
  ),
  Mutant(
    'index_queries_in_float8_score_without_their_scales',
    _INDEXER,
    '    weight = weight * query.scale\n',
    '',
    (f'{_INDEX_TEST}::choices_are_those_of_float64',),
    'V3.2, fp8_index: the scale of a query and head is part of its weight',
  ),
  Mutant(
    'operation_leaves_out_the_scales_of_keys',
    'pallas_kernels/indexer/reference.py',
    '    total *= k_scale\n',
    '    total *= 1.0\n',
    (f'{_OP_TEST}::float8_equals_a_loop',),
    'V3.2, fp8_index: the scale of a key multiplies the sum over heads',
  ),
  Mutant(
    'operation_leaves_out_the_scales_of_queries',
    'pallas_kernels/indexer/__init__.py',
    '    w = w.astype(jnp.float32) * q_scale\n',
    '    w = w.astype(jnp.float32)\n',
    (f'{_OP_TEST}::float8_equals_a_loop',),
    'V3.2, fp8_index: the scale of a query and head is part of its weight',
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
  Mutant(
    'activation_gradient_without_the_slope_of_silu',
    'pallas_kernels/swiglu_quantize/reference.py',
    '  (found,) = pull(grad.astype(jnp.float32))\n',
    '  (found,) = pull(grad.astype(jnp.float32))\n'
    '  found = found * jax.nn.sigmoid(wide)\n',
    (f'{_SWIGLU_TEST}::the_gradient_is_that_of_float64',),
    'a forward pass that is right says nothing of its gradient',
  ),
  Mutant(
    'activation_in_float8_without_its_limit',
    'pallas_kernels/swiglu_quantize/reference.py',
    '  values = activate(gate_up, limit)\n',
    '  values = activate(gate_up, None)\n',
    (f'{_SWIGLU_TEST}::it_is_the_nearest_float8_of_the_activation',),
    'V4 limits gate and up before they meet',
  ),
  Mutant(
    'experts_gradient_without_the_limit',
    'pallas_kernels/grouped_matmul/from_tokens.py',
    "  how = {'limit': limit, 'power_of_two': True, 'impl': impl}\n",
    "  how = {'power_of_two': True, 'impl': impl}\n",
    (f'{_TOKENS_TEST}::value_and_gradients_are_those_of_rows',),
    'the gradient of an activation that was not computed',
  ),
  Mutant(
    'streams_normed_one_by_one',
    'pallas_kernels/collapse_norm/reference.py',
    "  x = jnp.einsum('NnD,Nn->ND', streams.astype(jnp.float32), pre)\n",
    '  x = streams.astype(jnp.float32)\n'
    '  x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps)\n'
    "  x = jnp.einsum('NnD,Nn->ND', x, pre)\n",
    ('tests/pallas_kernels/collapse_norm_test.py::value_and_gradients',),
    'V4 section 2: the norm is of the weighted sum',
  ),
  Mutant(
    'sublayer_reads_streams_without_its_norms_scale',
    'deepseek_jax/model/hyper_connections.py',
    '    (stream, pre, norm.scale[...]),\n',
    '    (stream, pre, jnp.ones_like(norm.scale[...])),\n',
    ('tests/model/hyper_connections_test.py::reading_and_norm_in_one',),
    'a kernel that has no norm of its own to test',
  ),
  Mutant(
    'streams_mixed_by_the_transposed_matrix',
    'pallas_kernels/write_streams/reference.py',
    "'NjD,Njk->NkD'",
    "'NjD,Nkj->NkD'",
    ('tests/pallas_kernels/write_streams_test.py::value_and_gradients',),
    'comb[j, k] is how much of stream j goes to stream k',
  ),
)
