"""Bugs of the memory of n-grams and of its hash."""

from tests.mutants.mutant import Mutant

_HASH = 'deepseek_jax/model/memory/ngram_hash.py'
_ENGRAM = 'deepseek_jax/model/memory/engram.py'
_ENGRAM_TEST = 'tests/model/memory/engram_test.py'
_NGRAMS_TEST = 'tests/data/ngrams_test.py'

MUTANTS = (
  Mutant(
    'hash_in_32_bits',
    _HASH,
    'return carried + a * high, middle << 16 | a0 * b0 & half',
    'return 0 * carried, middle << 16 | a0 * b0 & half',
    (f'{_ENGRAM_TEST}::rows_equal_the_hosts_to_the_bit',),
    'V4 trap 13: int64 hashing in JAX',
  ),
  Mutant(
    'n_grams_cross_documents',
    'deepseek_jax/data/ngrams.py',
    '    same = same & (positions[:, now] >= k)\n'
    '    out[:, now, k] = np.where(same, classes[:, before], PAD)\n',
    '    out[:, now, k] = classes[:, before]\n',
    (f'{_NGRAMS_TEST}::sees_its_own_document_alone',),
    'Engram: positions before the start are padding',
    fast=True,
  ),
  Mutant(
    'tables_share_their_first_rows',
    'deepseek_jax/data/ngrams.py',
    'return (np.cumsum(flat, axis=1) - flat).reshape(sizes.shape)',
    'return 0 * flat.reshape(sizes.shape)',
    (f'{_NGRAMS_TEST}::each_table_has_rows_of_its_own',),
    'Engram: tables lie one after the other',
    fast=True,
  ),
  Mutant(
    'memory_reads_the_next_token',
    _HASH,
    'joined[:, N - 1 - k :][:, :T]',
    'jnp.roll(joined, -1, 1)[:, N - 1 - k :][:, :T]',
    (f'{_ENGRAM_TEST}::a_token_changes_no_logit_before_it',),
    'Engram: an n-gram ends with the present token',
  ),
  Mutant(
    'convolution_crosses_documents',
    _ENGRAM,
    'y += jnp.where(seen, tap, 0) * self.conv[k]',
    'y += tap * self.conv[k]',
    (f'{_ENGRAM_TEST}::equals_float64_in_documents',),
    'packed documents are apart',
  ),
  Mutant(
    'memory_gate_without_its_sign',
    _ENGRAM,
    'jax.nn.sigmoid(jnp.sign(agree) * root)',
    'jax.nn.sigmoid(root)',
    (f'{_ENGRAM_TEST}::equals_float64_in_documents',),
    'Engram: sigmoid(sign(a) sqrt(|a|))',
  ),
  Mutant(
    'tables_decay_beside_muon',
    'deepseek_jax/train/optimizer.py',
    'not split and not table and (matrix or cfg.muon.vectors)',
    'not split and (matrix or cfg.muon.vectors)',
    (f'{_ENGRAM_TEST}::tables_do_not_decay_beside_muon',),
    'Engram: tables without decay',
  ),
  Mutant(
    'keys_of_all_streams_as_one_matrix',
    _ENGRAM,
    "(None, 'streams', 'embed')",
    "(None, None, 'embed')",
    ('tests/train/muon_test.py::what_memories_and_branches_share',),
    'V4 section 2.4: every logically independent matrix',
  ),
  Mutant(
    'marks_with_a_width_kept',
    'deepseek_jax/data/ngrams.py',
    'normalizers.StripAccents(),',
    "normalizers.Replace(Regex(r'\\p{Mn}'), ''),",
    (f'{_NGRAMS_TEST}::normalized_text',),
    'Engram: accents are stripped',
  ),
)
