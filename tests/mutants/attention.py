"""Bugs of attention, of rotary positions and of the norms."""

from tests.mutants.mutant import Mutant

_ROPE = 'deepseek_jax/model/attention/rope.py'
_MLA = 'deepseek_jax/model/attention/mla.py'
_CORE = 'deepseek_jax/model/attention/softmax.py'
_ROPE_TEST = 'tests/model/attention/rope_test.py'
_MLA_TEST = 'tests/model/attention/mla_test.py'
_CORE_TEST = 'tests/model/attention/softmax_test.py'

MUTANTS = (
  Mutant(
    'rope_layouts_swapped',
    _ROPE,
    '  if cfg.interleaved:\n',
    '  if not cfg.interleaved:\n',
    (f'{_ROPE_TEST}::equals_complex_rotation',),
    'V3.2-Exp demo of September 2025; sglang 13439, mlx-lm 512',
    fast=True,
  ),
  Mutant(
    'rope_turns_backwards',
    _ROPE,
    '    out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)\n',
    '    out = jnp.stack([a * cos + b * sin, b * cos - a * sin], axis=-1)\n',
    (f'{_ROPE_TEST}::equals_complex_rotation',),
    'scores stay relative, so only an absolute reference sees it',
  ),
  Mutant(
    'mscale_on_cos_and_sin',
    _ROPE,
    'return mscale(yarn.factor, yarn.mscale) / mscale(\n'
    '      yarn.factor, yarn.mscale_all_dim\n    )',
    'return mscale(yarn.factor, yarn.mscale)',
    (f'{_ROPE_TEST}::softmax_scale_of_released_models',),
    'V2/V3 trap 2: cos and sin stay as they are',
  ),
  Mutant(
    'mscale_not_squared',
    _ROPE,
    'mscale(cfg.scaling.factor, cfg.scaling.mscale_all_dim) ** 2',
    'mscale(cfg.scaling.factor, cfg.scaling.mscale_all_dim)',
    (f'{_ROPE_TEST}::softmax_scale_of_released_models',),
    'V2/V3 trap 2: its square enters the softmax',
    fast=True,
  ),
  Mutant(
    'mscale_left_out_of_the_softmax',
    _MLA,
    '** -0.5 * softmax_multiplier(\n      self.rope\n    )',
    '** -0.5',
    (f'{_ROPE_TEST}::softmax_scale_of_released_models',),
    'V2/V3 trap 2: YaRN is always on for released weights',
  ),
  Mutant(
    'softmax_scale_of_the_no_rope_dims',
    _MLA,
    '(self.nope_dim + self.rope_dim) ** -0.5',
    'self.nope_dim**-0.5',
    (f'{_ROPE_TEST}::softmax_scale_of_released_models',),
    'V2/V3 trap 2: the scale is that of all 192 dims',
  ),
  Mutant(
    'yarn_slows_the_high_frequencies',
    _ROPE,
    'base * (1 - ramp) + base / yarn.factor * ramp',
    'base * ramp + base / yarn.factor * (1 - ramp)',
    (f'{_ROPE_TEST}::yarn_equals_the_published_vector',),
    'YaRN keeps high frequencies and slows low ones',
  ),
  Mutant(
    'latent_cached_before_its_norm_and_rope',
    _MLA,
    'return type(new)(*map(put, past, new))',
    'raw = jnp.split(x @ self.kv_down[...], [16], axis=-1)\n'
    '      return Latent(*map(put, past, raw))',
    (f'{_MLA_TEST}::either_form_reads_the_cache_alike',),
    'V2/V3 trap 3: cached after the norm and after rope',
  ),
  Mutant(
    'absorbed_form_without_the_rope_key',
    _MLA,
    "    scores += jnp.einsum('BTHR,BSR->BHTS', qr, latent.kr, **f32)\n",
    '',
    (f'{_MLA_TEST}::absorbed_equals_expanded',),
    'V2 section 2.1.2: both parts of the key score',
  ),
  Mutant(
    'absorbed_form_without_a_causal_mask',
    _MLA,
    'visible = positions[..., None] >= jnp.arange(latent.c.shape[1])',
    'visible = positions[..., None] >= 0 * jnp.arange(latent.c.shape[1])',
    (f'{_MLA_TEST}::absorbed_equals_expanded',),
    'transformers before 5.23 had V4 layers without one',
  ),
  Mutant(
    'rotary_key_normed',
    _MLA,
    'return Latent(self.kv_norm(c), rope(kr, positions, self.cfg.rope))',
    'kr = kr * jax.lax.rsqrt((kr * kr).mean(-1, keepdims=True) + 1e-6)\n'
    '    return Latent(self.kv_norm(c), rope(kr, positions, self.cfg.rope))',
    (f'{_MLA_TEST}::equals_float64_in_documents',),
    'V2 section 2.1: the shared rotary key has no norm',
  ),
  Mutant(
    'a_query_sees_the_next_token',
    _CORE,
    'mask = index[start:, None] >= index\n',
    'mask = index[start:, None] >= index - 1\n',
    (f'{_CORE_TEST}::bfloat16_keeps_its_softmax',),
    'a causal mask one off',
  ),
  Mutant(
    'a_query_sees_other_documents',
    _CORE,
    'return mask & (segments[start:end, None] == segments[:end])',
    'return mask',
    (f'{_MLA_TEST}::equals_float64_in_documents',),
    'V2/V3 trap 9: fine-tuning masks other samples',
  ),
  Mutant(
    'backward_without_a_causal_mask',
    _CORE,
    'seen = _mask(segments, start, end).T',
    'seen = True',
    (f'{_CORE_TEST}::value_and_gradients_equal_float64',),
    'a forward pass that is right says nothing of its gradient',
  ),
  Mutant(
    'cached_query_does_not_see_itself',
    _CORE,
    'mask = positions[..., None] >= jnp.arange(k.shape[1])',
    'mask = positions[..., None] > jnp.arange(k.shape[1])',
    (f'{_CORE_TEST}::sees_exactly_the_slots',),
    'visibility one off',
  ),
  Mutant(
    'key_heads_interleaved',
    _CORE,
    'jnp.repeat(x.transpose(0, 2, 1, 3), heads // G, axis=1)',
    'jnp.tile(x.transpose(0, 2, 1, 3), (1, heads // G, 1, 1))',
    ('tests/model/attention/gqa_test.py::equals_float64',),
    'a group of query heads is consecutive',
  ),
  Mutant(
    'padding_enters_the_cache',
    'deepseek_jax/model/cache.py',
    'jnp.where(valid, positions, buffer.shape[1])',
    'positions',
    ('tests/model/transformer_test.py::write_puts_valid_tokens',),
    'V4 trap 8: caches of padded prompts',
  ),
  Mutant(
    'norm_in_low_precision',
    'deepseek_jax/model/norm.py',
    'y = x.astype(jnp.float32)\n',
    'y = x\n',
    ('tests/model/norm_test.py::bfloat16_rounds_only',),
    'norms are float32 in every release',
  ),
  Mutant(
    'norm_eps_outside_the_root',
    'deepseek_jax/model/norm.py',
    'jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)',
    '1 / (jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True)) + self.eps)',
    ('tests/model/norm_test.py::equals_float64',),
    'eps lies under the root',
  ),
)
