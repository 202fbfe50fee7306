"""Bugs of reading, writing and converting checkpoints."""

from tests.mutants.mutant import Mutant

_ORIGIN_TEST = 'tests/hf/origin_test.py'
_RELEASED_TEST = 'tests/hf/released_test.py'
_HOSTILE_TEST = 'tests/hf/hostile_test.py'

MUTANTS = (
  Mutant(
    'fingerprint_of_sizes_only',
    'deepseek_jax/hf/identity.py',
    'digest.update(_read(file.fileno(), start, length, path))',
    '_read(file.fileno(), start, length, path)',
    (f'{_ORIGIN_TEST}::every_tensor_counts',),
    'convert: a fine-tune has the sizes of its base',
  ),
  Mutant(
    'conversion_keeps_the_base',
    'deepseek_jax/hf/record.py',
    '    if other:\n',
    "    if other and not other.startswith('work.source'):\n",
    (f'{_ORIGIN_TEST}::killed_folder_goes_on',),
    'convert: half of one model and half of another',
  ),
  Mutant(
    'conversion_forgets_its_format',
    'deepseek_jax/hf/saving.py',
    "'format': target._asdict(),",
    "'format': None,",
    (f'{_ORIGIN_TEST}::killed_folder_goes_on',),
    'convert: scales of fp8 under a config.json of ue8m0',
  ),
  Mutant(
    'chunks_are_not_hashed',
    'deepseek_jax/hf/store.py',
    "content = self._verify == 'full'",
    'content = False',
    (f'{_ORIGIN_TEST}::every_flipped_bit_is_found',),
    'tensorstore returns flipped bytes without notice',
  ),
  Mutant(
    'half_written_folder_is_loaded',
    'deepseek_jax/hf/record.py',
    ".get('complete') is not True",
    ".get('complete') is None",
    (f'{_ORIGIN_TEST}::killed_save_over_a_model',),
    'a killed save leaves shards of two models under one index',
  ),
  Mutant(
    'drafter_is_ignored_in_silence',
    'deepseek_jax/hf/source.py',
    'bool(parsed.drafter) or self._has_drafter()',
    'False',
    (f'{_RELEASED_TEST}::drafter_is_named',),
    'vLLM 41834: -0731 has a drafter where V4 had its MTP layer',
  ),
  Mutant(
    'negative_epsilon_is_read',
    'deepseek_jax/hf/config_limits.py',
    '_EPS = Range(1e-20, 1.0)',
    '_EPS = Range(-1e6, 1.0)',
    (f'{_HOSTILE_TEST}::the_field_is_named_at_once',),
    'a downloaded rms_norm_eps of -1 computes NaN',
    fast=True,
  ),
  Mutant(
    'linear_scaling_is_ignored',
    'deepseek_jax/model/attention/rope.py',
    'return base / cfg.scaling.factor',
    'return base',
    ('tests/model/attention/rope_test.py::equals_a_loop_over_pairs',),
    'deepseek-coder: positions are divided by 4',
  ),
)
