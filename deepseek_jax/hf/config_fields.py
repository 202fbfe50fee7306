"""Lists which fields of a config.json are understood, as data.

Every field is mapped to one of ours, or read together with others, or allowed
one value, or known not to change what the model computes. There is no fifth
kind: a field that is in no table here is an error.
"""

from typing import Any, NamedTuple

from deepseek_jax.hf import config_limits
from deepseek_jax.hf.families import v32

REQUIRED = object()


class Field(NamedTuple):
  """Describes a field that determines what the model computes."""

  ours: str
  kind: type
  default: Any = REQUIRED


_COMMON = {
  'vocab_size': Field('vocab_size', int),
  'hidden_size': Field('dim', int),
  'intermediate_size': Field('ffn.width', int),
  'num_attention_heads': Field('attention.heads', int),
  'rms_norm_eps': Field('norm_eps', float),
  'initializer_range': Field('init_std', float, 0.02),
  'tie_word_embeddings': Field('tied', bool, False),
}
_LATENT = {
  'q_lora_rank': Field('attention.q_rank', int | None),
  'kv_lora_rank': Field('attention.kv_rank', int),
  'qk_nope_head_dim': Field('attention.nope_dim', int),
  'qk_rope_head_dim': Field('attention.rope_dim', int),
  'v_head_dim': Field('attention.v_dim', int),
}
_EXPERTS = {
  'n_routed_experts': Field('moe.experts', int),
  'num_experts_per_tok': Field('moe.top_k', int),
  'moe_intermediate_size': Field('moe.width', int),
  'n_shared_experts': Field('moe.shared', int | None),
  'routed_scaling_factor': Field('moe.router.scale', float),
  'norm_topk_prob': Field('moe.router.normalize', bool),
}
MAPPED = {
  'llama': _COMMON,
  'deepseek_v2': {**_COMMON, **_LATENT, **_EXPERTS},
  'deepseek_v3': {**_COMMON, **_LATENT, **_EXPERTS},
  v32.FAMILY: {
    **_COMMON,
    **_LATENT,
    'q_lora_rank': Field('attention.q_rank', int),
    **_EXPERTS,
    **{name: Field(ours, int) for name, ours in v32.FIELDS.items()},
  },
}

# Read by the functions below, not one to one.
SPECIAL = {
  'llama': {'num_key_value_heads', 'head_dim'},
  'deepseek_v2': {'topk_method', 'n_group', 'topk_group'},
  'deepseek_v3': {
    'n_group',
    'topk_group',
    'num_nextn_predict_layers',
    'num_mtp_layers',
    'rope_interleave',
  },
  v32.FAMILY: {
    'n_group',
    'topk_group',
    'num_nextn_predict_layers',
    'num_mtp_layers',
    *v32.LAYERS,
  },
}
ALWAYS = {
  'model_type',
  'architectures',
  'quantization_config',
  'num_hidden_layers',
  'first_k_dense_replace',
  'rope_theta',
  'rope_scaling',
  'rope_parameters',
  'max_position_embeddings',
}

# Fields that may hold these values only: no other is implemented.
FIXED = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'attention_dropout': (0, None),
  'pretraining_tp': (1, None),
  'moe_layer_freq': (1,),
  'partial_rotary_factor': (1, None),
  'mtp_hidden_states_first': (False,),
  'is_decoder': (False, True),
  'is_encoder_decoder': (False,),
  'add_cross_attention': (False,),
}
FIXED_OF = {
  'llama': {},
  'deepseek_v2': {'scoring_func': ('softmax',)},
  'deepseek_v3': {'scoring_func': ('sigmoid',), 'topk_method': ('noaux_tc',)},
  v32.FAMILY: {
    'scoring_func': ('sigmoid',),
    'topk_method': ('noaux_tc',),
    'rope_interleave': (True,),
  },
}

# Fields that change no number that the model computes from given weights.
CARRIED = frozenset(
  {
    'bos_token_id',
    'eos_token_id',
    'pad_token_id',
    'use_cache',
    'torch_dtype',
    'dtype',
    'transformers_version',
    'auto_map',
    'ep_size',
    'aux_loss_alpha',  # weights of training losses: a recipe, not the model
    'seq_aux',
    'output_router_logits',
    'output_attentions',
    'output_hidden_states',
    'return_dict',
    'chunk_size_feed_forward',
    'id2label',
    'label2id',
    'problem_type',
  }
)
ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'deepseek_v2': 'DeepseekV2ForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
  v32.FAMILY: 'DeepseekV32ForCausalLM',
  'deepseek_v4': 'DeepseekV4ForCausalLM',
}
# Other names of a family, by which serving software distinguishes models. A
# written file has the name of its architecture.
ALIASES = {'kimi_k2': 'deepseek_v3'}


def family(model_type: Any) -> str:
  """Returns the family that a model_type names; InputError if none is read."""
  if isinstance(model_type, str):
    model_type = ALIASES.get(model_type, model_type)
    if model_type in ARCHITECTURES:
      return model_type
  known = [*ARCHITECTURES, *ALIASES]
  raise config_limits.error('model_type', model_type, f'must be one of {known}')


def is_carried(name: str) -> bool:
  """Returns whether a field changes no number of the model."""
  # unsloth notes how it has loaded and repaired the tokenizer.
  return (
    name in CARRIED
    or name == 'max_position_embeddings'
    or name.startswith('unsloth_')
  )
