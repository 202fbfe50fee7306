"""Bugs of the kernels' references and of the choice between them."""

from tests.mutants.mutant import Mutant

_TESTS = 'tests/pallas_kernels'
# Of V3 and of V3.2.
_MESH = 'tests/model/kernels_mesh_test.py::shards_are_those_of_the_whole'

MUTANTS = (
  Mutant(
    'forced_kernel_falls_back_in_silence',
    'pallas_kernels/dispatch.py',
    '  if impl is not None:\n',
    "  if impl not in (None, 'gpu'):\n",
    (f'{_TESTS}/dispatch_test.py::a_forced_choice_is_kept',),
    'a forced implementation is never swapped for another',
    fast=True,
  ),
  Mutant(
    'speculative_tokens_attend_to_later_ones',
    'pallas_kernels/mla_decode/reference.py',
    'seen = lengths[:, None] - (T - 1) + jnp.arange(T)',
    'seen = lengths[:, None] + jnp.zeros(T, jnp.int32)',
    (f'{_TESTS}/mla_decode_test.py::reference_equals_a_loop_in_float64',),
    'several new tokens in one decoding step are causal among themselves',
  ),
  Mutant(
    'unchosen_latents_count_if_nan',
    'pallas_kernels/sparse_mla/reference.py',
    'keys = jnp.where(here[:, None], c[at], 0)',
    'keys = c[at]',
    (f'{_TESTS}/sparse_mla_test.py::latents_that_are_not_chosen',),
    '0 * nan is nan: a weight of zero does not hide what was not written',
  ),
  Mutant(
    'packed_segments_by_growing_number',
    'pallas_kernels/mla_prefill/__init__.py',
    'changes = segments[:, 1:] != segments[:, :-1]',
    'changes = segments[:, 1:] > segments[:, :-1]',
    (f'{_TESTS}/mla_prefill_test.py::a_number_that_comes_back',),
    'packed rows: a document number may fall, and come back',
  ),
  Mutant(
    'kernel_chosen_by_the_hosts_first_device',
    'pallas_kernels/target.py',
    '  return jax.devices()[0] if default is None else default\n',
    '  return jax.devices()[0]\n',
    (f'{_TESTS}/target_test.py::what_says_most_decides',),
    'on a host with a GPU what runs on its CPU gets no kernel',
    fast=True,
  ),
  Mutant(
    'window_that_begins_behind_the_keys',
    'pallas_kernels/indexer/__init__.py',
    '(jnp.clip(a, 0, k.shape[1]) for a in (first, last))',
    'jnp.maximum(first, 0), jnp.minimum(last, k.shape[1])',
    (f'{_TESTS}/bounds_test.py::begins_behind_the_keys',),
    'its kernel wrote behind its buffer in shared memory',
  ),
  Mutant(
    'position_of_the_next_rows_latents',
    'pallas_kernels/sparse_mla/__init__.py',
    'jnp.where(index < c.shape[1], index.astype(jnp.int32), -1)',
    'index.astype(jnp.int32)',
    (f'{_TESTS}/bounds_test.py::not_one_of_the_next_row',),
    'FlashMLA: positions of s_kv or more choose nothing',
  ),
  Mutant(
    'more_tokens_than_pages',
    'pallas_kernels/mla_decode/__init__.py',
    'lengths = jnp.clip(lengths, 0, table.shape[1] * c.shape[1])',
    'lengths = jnp.maximum(lengths, 0)',
    (f'{_TESTS}/bounds_test.py::no_more_tokens_are_read',),
    'the page table ends: behind it lie other numbers',
  ),
  Mutant(
    'kernel_lowered_for_any_platform',
    'pallas_kernels/lowering_guard.py',
    "wrong = [p for p in platforms if p != 'cuda']",
    'wrong = []',
    (f'{_TESTS}/target_test.py::another_platform_is_one_clear_line',),
    "ROCm got NVIDIA's code, a TPU an empty assertion",
  ),
  Mutant(
    'index_heads_of_one_device_choose',
    'deepseek_jax/model/attention/dsa.py',
    '  if along.heads:\n    whole',
    '  if not along.axis:\n    whole',
    (f'{_MESH}1',),
    'tensor parallelism: all index heads score a key together',
  ),
  Mutant(
    'heads_of_the_first_shard_everywhere',
    'deepseek_jax/model/attention/latent_reading.py',
    'dynamic_slice_in_dim(up, along.index * size, size, axis=1)',
    'dynamic_slice_in_dim(up, 0 * size, size, axis=1)',
    (f'{_MESH}0',),
    'sequences shared by exchange of heads: each device has its own',
  ),
  Mutant(
    'several_new_tokens_read_other_rows',
    'deepseek_jax/model/attention/mla.py',
    'table = jnp.repeat(jnp.arange(B, dtype=jnp.int32), T)[:, None]',
    'table = jnp.tile(jnp.arange(B, dtype=jnp.int32), T)[:, None]',
    ('tests/model/kernels_test.py::several_new_tokens_of_a_row',),
    'a page table has one row for each request, in order',
  ),
)
