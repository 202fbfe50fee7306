"""Bugs of what families of checkpoints mean, and of what they cannot hold."""

from tests.mutants.mutant import Mutant

_FAMILIES_TEST = 'tests/hf/families_test.py'
_V4_TEST = 'tests/hf/v4_config_test.py'
_QWEN_TEST = 'tests/hf/qwen3_moe_test.py'
_PLAIN = 'deepseek_jax/hf/families/plain.py'
_V4_LAYERS = 'deepseek_jax/hf/families/v4_layers.py'

MUTANTS = (
  Mutant(
    'heads_are_normed_after_they_rotate',
    'deepseek_jax/model/attention/gqa.py',
    """    if cfg.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)  # per head, before they rotate
    q, k = (rope(a, ctx.positions, cfg.rope) for a in (q, k))
""",
    """    q, k = (rope(a, ctx.positions, cfg.rope) for a in (q, k))
    if cfg.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
""",
    ('tests/model/attention/gqa_test.py::equals_float64',),
    'Qwen3: scales of channels and a rotation of them do not commute',
  ),
  Mutant(
    'prediction_block_is_lost',
    'deepseek_jax/hf/families/v4.py',
    "    require(config.mtp.block, 'mtp.block', _MTP_BLOCK)\n",
    '',
    (f'{_FAMILIES_TEST}::v4_predicts_with_a_window_alone',),
    'V4: another block of prediction was written and could not be read back',
  ),
  Mutant(
    'clamp_is_lost',
    _PLAIN,
    "  require(block.ffn.limit, f'{name}.limit', None)\n",
    '',
    (f'{_FAMILIES_TEST}::every_field_is_kept_or_refused',),
    'a V3 with clamped experts was written as one without',
  ),
  Mutant(
    'departing_layer_is_lost',
    _PLAIN,
    'if block.ffn != getattr(config, name):',
    'if False:',
    (f'{_FAMILIES_TEST}::a_layer_that_departs_is_kept_or_refused',),
    'experts of one kind with another scale were written with the shared one',
  ),
  Mutant(
    'part_of_a_channel_is_cut_off',
    _V4_LAYERS,
    'if abs(exact - counted) > 1e-4:',
    'if False:',
    (f'{_V4_TEST}::part_of_a_channel_is_refused',),
    'partial_rotary_factor: 34.5 channels were read as 34',
  ),
  Mutant(
    'base_of_a_rope_contradicts_in_silence',
    'deepseek_jax/hf/rope_json.py',
    'if given is not None and _number(outer, given) != inner:',
    'if False:',
    (f'{_V4_TEST}::contradictions_are_named',),
    'rope_theta edited in one of the two places of a file',
  ),
  Mutant(
    'sparse_step_counts_from_0',
    'deepseek_jax/hf/families/qwen3_moe.py',
    '(i + 1) % step == 0',
    'i % step == 0',
    (f'{_QWEN_TEST}::dense_layers',),
    'decoder_sparse_step: the first layer of every pair is the dense one',
  ),
)
