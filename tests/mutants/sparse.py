"""Bugs of sparse attention: V3.2 and NSA."""

from tests.mutants.mutant import Mutant

_INDEXER = 'deepseek_jax/model/attention/indexer.py'
_DSA = 'deepseek_jax/model/attention/dsa.py'
_CHOSEN = 'deepseek_jax/model/attention/dsa_reading.py'
_NSA = 'deepseek_jax/model/attention/nsa.py'
_BRANCHES = 'deepseek_jax/model/attention/nsa_branches.py'
_NSA_TEST = 'tests/model/attention/nsa_test.py'
_INDEXER_TEST = 'tests/model/attention/indexer_test.py'
_DSA_TEST = 'tests/model/attention/dsa_test.py'
_PAGED_TEST = 'tests/infer/paged_sparse_test.py'

_V32 = (
  Mutant(
    'indexer_without_a_causal_mask',
    _INDEXER,
    'flat = jnp.where(seen, scores, -jnp.inf).reshape(B * T, S)',
    'flat = scores.reshape(B * T, S)',
    (f'{_INDEXER_TEST}::what_is_not_seen_is_never_chosen',),
    'transformers before 5.23',
    fast=True,
  ),
  Mutant(
    'indexer_of_the_attentions_rope_layout',
    _INDEXER,
    'self.rope = dataclasses.replace(rope_cfg, interleaved=cfg.interleaved)',
    'self.rope = rope_cfg',
    (f'{_INDEXER_TEST}::test_equal_float64',),
    'V2/V3 trap 1: halves in the indexer, pairs in the attention',
  ),
  Mutant(
    'indexer_turns_its_last_dims',
    _INDEXER,
    'first, rest = jnp.split(x, [self.rope_dim], axis=-1)\n'
    '    first = rope(first, positions, self.rope)\n'
    '    return jnp.concatenate([first, rest], axis=-1)',
    'rest, last = jnp.split(x, [x.shape[-1] - self.rope_dim], axis=-1)\n'
    '    last = rope(last, positions, self.rope)\n'
    '    return jnp.concatenate([rest, last], axis=-1)',
    (f'{_INDEXER_TEST}::test_equal_float64',),
    'V2/V3 trap 1: rope dims come first in the indexer',
  ),
  Mutant(
    'index_key_norm_without_bias',
    _INDEXER,
    'return (y * self.scale[...] + self.bias[...]).astype(x.dtype)',
    'return (y * self.scale[...]).astype(x.dtype)',
    (f'{_INDEXER_TEST}::bias_of_the_key_norm_counts',),
    'V2/V3 trap 10: k_norm is a LayerNorm with a bias',
    fast=True,
  ),
  Mutant(
    'index_key_norm_not_centred',
    _INDEXER,
    '    y = y - y.mean(axis=-1, keepdims=True)\n',
    '',
    (f'{_INDEXER_TEST}::keys_are_normed_about_their_mean',),
    'V2/V3 trap 10: a LayerNorm, not an RMSNorm',
  ),
  Mutant(
    'index_weights_scaled_by_the_heads_alone',
    _INDEXER,
    'scale = (self.cfg.heads * self.cfg.dim) ** -0.5',
    'scale = self.cfg.heads**-0.5',
    (f'{_INDEXER_TEST}::test_equal_float64',),
    'V2/V3 trap 10: 64^-0.5 and 128^-0.5 are in the weights',
  ),
  Mutant(
    'ties_of_minus_zero_lose',
    _INDEXER,
    '  scores = jnp.where(scores == 0, 0.0, scores)',
    '  scores = scores + 0 * scores',
    (f'{_INDEXER_TEST}::minus_zero_is_zero',),
    'V4 trap 5: ReLU makes exact zeros of both signs',
  ),
  Mutant(
    'indexer_learns_from_attached_inputs',
    _DSA,
    'x, latent = jax.lax.stop_gradient((x, self.query_latent(x)))',
    'latent = self.query_latent(x)',
    (f'{_DSA_TEST}::loss_teaches_only_the_indexer',),
    'V2/V3 trap 10: the indexer takes its inputs detached',
  ),
  Mutant(
    'missing_choices_attended',
    _CHOSEN,
    'scores = jnp.where(at[:, :, None] >= 0, scores * scale, MASKED)',
    'scores = scores * scale',
    (f'{_DSA_TEST}::output_loss_and_recall_equal',),
    'V3.2: future and padded slots among the top k stay masked',
  ),
  Mutant(
    'padding_reads_pages',
    'deepseek_jax/model/attention/sparse_latent.py',
    '      there &= valid[..., None]\n',
    '      there &= valid[..., None] | there\n',
    (f'{_PAGED_TEST}::all_pages_are_one_row',),
    'what is no token reads nothing: its pages may be of others',
  ),
  Mutant(
    'new_tokens_are_not_in_the_pages',
    _DSA,
    'held = self.write(x, ctx, latent, past.latents)',
    'held = past.latents\n'
    '    if not paged:\n'
    '      held = self.write(x, ctx, latent, past.latents)',
    (f'{_PAGED_TEST}::choices_are_read_from_a_rows_own_pages',),
    'V3.2 section 2.1: a query may choose its own token',
  ),
  Mutant(
    'index_keys_stay_in_pages',
    'deepseek_jax/infer/paged_latents.py',
    'tuple(node.latents if type(node) is SparseLatent else node)',
    'tuple(node[:3] if type(node) is SparseLatent else node)',
    (f'{_PAGED_TEST}::each_kind_of_layer_stays',),
    'V3.2 section 2.1: index keys are scored all, so rows of them are wanted',
  ),
  Mutant(
    'drafts_gather_their_rows',
    'deepseek_jax/infer/paged_latents.py',
    'held = jax.tree.unflatten(structure, range(count))',
    'held = jax.tree.unflatten(structure, range(count))[0]',
    (f'{_PAGED_TEST}::each_kind_of_layer_stays',),
    'V3 section 2.2: the blocks that draft cache latents, too',
  ),
)

_NATIVE = (
  Mutant(
    'incomplete_blocks_compressed',
    _BRANCHES,
    'return seen & (end <= one.place[..., None])',
    'return seen & (start <= one.place[..., None])',
    (f'{_NSA_TEST}::equals_loops_in_packed_documents',),
    'NSA section 3.3: complete past blocks only',
  ),
  Mutant(
    'each_head_chooses_its_own_blocks',
    _BRANCHES,
    'shares = jax.lax.stop_gradient(p).sum(axis=3)',
    'shares = jax.lax.stop_gradient(p)[:, :, :, 0]',
    (f'{_NSA_TEST}::equals_loops_in_packed_documents',),
    'NSA eq. 10: scores are summed over the heads of a group',
  ),
  Mutant(
    'overlap_of_blocks_one_stride_off',
    _BRANCHES,
    'near = strides - (cfg.block // cfg.stride - 1)',
    'near = strides - cfg.block // cfg.stride',
    (f'{_NSA_TEST}::equals_loops_in_packed_documents',),
    'NSA eq. 9: its index holds when it counts from 1',
  ),
  Mutant(
    'first_and_local_blocks_not_forced',
    _BRANCHES,
    '  scores = jnp.where(always, 1e30, scores)\n',
    '  del always\n',
    (f'{_NSA_TEST}::equals_loops_in_packed_documents',),
    'NSA section 4.1: one initial and two local blocks are always read',
  ),
  Mutant(
    'branches_share_their_keys',
    _BRANCHES,
    'return Keys(k[:, :, branch], v[:, :, branch])',
    'return Keys(k[:, :, CMP], v[:, :, CMP])',
    (f'{_NSA_TEST}::equals_loops_in_packed_documents',),
    'NSA section 3.3: keys and values of their own',
  ),
  Mutant(
    'gates_add_up_to_1',
    _NSA,
    'gates = jax.nn.sigmoid(gates)',
    'gates = jax.nn.softmax(gates)',
    (f'{_NSA_TEST}::equals_loops_in_packed_documents',),
    'NSA eq. 5: each gate by itself',
  ),
)

_SUMS = (
  Mutant(
    'gradients_of_blocks_summed_in_bfloat16',
    'deepseek_jax/model/attention/query_blocks.py',
    'if any(map(lookup.short, jax.tree.leaves(shared))):',
    'if False:',
    ('tests/model/lookup_test.py::latent_of_many_blocks',),
    "V3 section 3.3: a scan's transpose adds in the dtype of what is shared",
  ),
  Mutant(
    'gradients_of_gathered_latents_reduced_as_they_travel',
    'deepseek_jax/parallel/collectives.py',
    'if grad.dtype.itemsize >= 4:',
    'if True:',
    ('tests/parallel/context_test.py::values_and_gradients_equal_one',),
    'a reduce-scatter of bfloat16 adds in bfloat16',
  ),
  Mutant(
    'gradients_of_queries_added_in_bfloat16_by_the_reference',
    'pallas_kernels/sparse_mla/reference.py',
    'picked = jnp.where(here[:, None], keys.c[at], 0)',
    'picked = wide(keys.c.astype(q_c.dtype)[at])',
    ('tests/pallas_kernels/sparse_mla_test.py::latent_that_all_queries',),
    'a scatter-add of bfloat16 rows stands still at 256 of them',
  ),
)

MUTANTS = (*_V32, *_NATIVE, *_SUMS)
