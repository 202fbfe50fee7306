"""config.json <-> TransformerConfig, field by field, nothing ignored silently.

Every field is mapped, or allowed one value, or known not to change what the
model computes (and then carried, so that it can be written again). Any other
field is an error. Meanings follow the code released with the checkpoints;
where transformers departs from it, the field's comment says so.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from deepseek_jax.config import from_dict
from deepseek_jax.errors import InputError
from deepseek_jax.hf import rope_json
from deepseek_jax.layers.ffn import FFNConfig
from deepseek_jax.layers.mla import MLAConfig
from deepseek_jax.layers.moe import MoEConfig
from deepseek_jax.layers.mtp import MTPConfig
from deepseek_jax.layers.residual import ResidualConfig
from deepseek_jax.presets import layout
from deepseek_jax.transformer import TransformerConfig

REQUIRED = object()


class Field(NamedTuple):
  """A field that says what the model computes."""

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
_MAPPED = {
  'llama': _COMMON,
  'deepseek_v2': {**_COMMON, **_LATENT, **_EXPERTS},
  'deepseek_v3': {**_COMMON, **_LATENT, **_EXPERTS},
}

# Read by the functions below, not one to one.
_SPECIAL = {
  'llama': {'num_key_value_heads', 'head_dim'},
  'deepseek_v2': {'topk_method', 'n_group', 'topk_group'},
  'deepseek_v3': {
    'n_group',
    'topk_group',
    'num_nextn_predict_layers',
    'num_mtp_layers',
    'rope_interleave',
  },
}
_ALWAYS = {
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
_FIXED = {
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
_FIXED_OF = {
  'llama': {},
  'deepseek_v2': {'scoring_func': ('softmax',)},
  'deepseek_v3': {'scoring_func': ('sigmoid',), 'topk_method': ('noaux_tc',)},
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
    'unsloth_version',
  }
)
_ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'deepseek_v2': 'DeepseekV2ForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
}


class Parsed(NamedTuple):
  """What a config.json says.

  Attributes:
    config: the model, with the MTP layers that the file has.
    carried: fields that don't change the model, to write again.
    quantization: its quantization_config, checked, or None.
  """

  config: TransformerConfig
  carried: dict[str, Any]
  quantization: dict[str, Any] | None


def parse(fields: Mapping[str, Any]) -> Parsed:
  """Raises InputError for any field that is not understood."""
  family = fields.get('model_type')
  if family not in _MAPPED:
    raise _error('model_type', family, f'must be one of {list(_MAPPED)}')
  _check_names(fields, family)
  values = {
    field.ours: _typed(fields, name, field)
    for name, field in _MAPPED[family].items()
  }
  values['attention.rope'] = rope_json.parse(fields, family)
  if family == 'llama':
    values |= _grouped_query(fields, values)
  else:
    values |= _latent(fields, values, family)
  config = _build(values)
  carried = {k: v for k, v in fields.items() if _is_carried(k)}
  return Parsed(config, carried, _quantization(fields))


def _error(name, value, fix):
  return InputError(f'config.json: {name} = {value!r}: {fix}')


def _is_carried(name):
  return name in CARRIED or name == 'max_position_embeddings'


def _check_names(fields, family):
  fixed = _FIXED | _FIXED_OF[family]
  known = {*_MAPPED[family], *_SPECIAL[family], *_ALWAYS, *CARRIED, *fixed}
  if family != 'llama':
    known |= {'head_dim', 'qk_head_dim', 'num_key_value_heads'}
  for name, value in fields.items():
    if name.startswith('_'):
      continue  # private notes of transformers: _name_or_path and the like
    if name not in known:
      raise _error(name, value, f'not understood for {family}; not supported')
    if name in fixed and value not in fixed[name]:
      raise _error(name, value, f'not supported; must be {fixed[name][0]!r}')
  named = fields.get('architectures')
  if named not in (None, [_ARCHITECTURES[family]]):
    raise _error(
      'architectures', named, f'must be [{_ARCHITECTURES[family]!r}]'
    )


def _typed(fields, name, field: Field):
  value = fields.get(name, field.default)
  if value is REQUIRED:
    raise InputError(f'config.json: {name}: missing')
  ok = isinstance(value, field.kind) and (
    field.kind is bool or not isinstance(value, bool)
  )
  if field.kind is float and type(value) is int:
    return float(value)
  if not ok:
    kind = getattr(field.kind, '__name__', str(field.kind))
    raise _error(name, value, f'must be {kind}')
  return value


def _integer(fields, name, default=None):
  value = fields.get(name, default)
  if value is not None and (type(value) is not int or value < 0):
    raise _error(name, value, 'must be a whole number')
  return value


def _grouped_query(fields, values) -> dict:
  heads = values['attention.heads']
  kv_heads = _integer(fields, 'num_key_value_heads')
  head_dim = _integer(fields, 'head_dim')
  return {
    'attention.kind': 'gqa',
    'attention.kv_heads': heads if kv_heads is None else kv_heads,
    'attention.head_dim': values['dim'] // heads
    if head_dim is None
    else head_dim,
    'layout': layout(_layers(fields), 0),
  }


def _layers(fields):
  layers = _integer(fields, 'num_hidden_layers')
  if not layers:
    raise _error('num_hidden_layers', layers, 'must be at least 1')
  return layers


def _latent(fields, values, family) -> dict:
  derived = {
    'num_key_value_heads': values['attention.heads'],
    'head_dim': values['attention.rope_dim'],
    'qk_head_dim': values['attention.nope_dim'] + values['attention.rope_dim'],
  }
  for name, value in derived.items():
    if fields.get(name) not in (None, value):
      raise _error(name, fields[name], f'not supported; must be {value}')
  layers = _layers(fields)
  dense = min(_integer(fields, 'first_k_dense_replace', 0), layers)
  mtp = _mtp_depth(fields, family)
  out = {
    'attention.kind': 'mla',
    'layout': layout(dense, layers - dense),
    'mtp.depth': mtp,
    'moe.shared': values['moe.shared'] or 0,
  }
  out |= _v2_router(fields, values) if family == 'deepseek_v2' else _v3(fields)
  if dense == layers and not mtp:  # a MoE that no layer uses
    drop = {k: None for k in values | out if k.startswith('moe.')}
    return out | drop | {'moe': None}
  return out


def _mtp_depth(fields, family):
  if family != 'deepseek_v3':
    return 0
  names = ('num_nextn_predict_layers', 'num_mtp_layers')
  depths = {_integer(fields, n) or 0 for n in names if n in fields}
  if len(depths) > 1:
    raise _error(names[0], fields[names[0]], f'contradicts {names[1]}')
  return depths.pop() if depths else 0


def _v2_router(fields, values) -> dict:
  method = fields.get('topk_method', 'greedy')
  if method not in ('greedy', 'group_limited_greedy'):
    raise _error(
      'topk_method', method, 'must be greedy or group_limited_greedy'
    )
  grouped = method == 'group_limited_greedy'
  out = {
    'moe.router.scoring': 'softmax',
    'moe.router.bias': False,
    'moe.router.group_score': 'max',
    'moe.router.groups': _integer(fields, 'n_group') or 1 if grouped else 1,
    'moe.router.top_groups': (_integer(fields, 'topk_group') or 1)
    if grouped
    else 1,
  }
  # V2's released code normalises in place of scaling, and only above one
  # expert; transformers reads the field and ignores it.
  if values['moe.router.normalize']:
    one = values['moe.top_k'] == 1
    out['moe.router.normalize'] = not one
    out['moe.router.scale'] = values['moe.router.scale'] if one else 1.0
  return out


def _v3(fields) -> dict:
  return {
    'moe.router.scoring': 'sigmoid',
    'moe.router.bias': True,
    'moe.router.group_score': 'top2',
    'moe.router.groups': _integer(fields, 'n_group') or 1,
    'moe.router.top_groups': _integer(fields, 'topk_group') or 1,
  }


def _build(values) -> TransformerConfig:
  nested: dict = {}
  for path, value in values.items():
    if value is None and path.startswith('moe.'):
      continue
    *above, last = path.split('.')
    inner = nested
    for key in above:
      inner = inner.setdefault(key, {})
    inner[last] = value
  try:
    return from_dict(TransformerConfig, nested)
  except InputError as error:
    raise InputError(f'config.json: {error}') from None


def _quantization(fields):
  found = fields.get('quantization_config')
  if found is None:
    return None
  allowed = {
    'quant_method': ('fp8',),
    'fmt': ('e4m3', None),
    'activation_scheme': ('dynamic', None),
    'scale_fmt': ('ue8m0', 'float', None),
    'weight_block_size': None,
    # Weights say for themselves whether they are quantised.
    'modules_to_not_convert': None,
    'dequantize': None,
  }
  for name, value in found.items():
    if name not in allowed:
      raise _error(f'quantization_config.{name}', value, 'not supported')
    if allowed[name] and value not in allowed[name]:
      fix = f'not supported; must be {allowed[name][0]!r}'
      raise _error(f'quantization_config.{name}', value, fix)
  block = found.get('weight_block_size')
  if (
    not isinstance(block, list)
    or len(block) != 2
    or not all(type(b) is int and b > 0 for b in block)
  ):
    raise _error(
      'quantization_config.weight_block_size', block, 'must be like [128, 128]'
    )
  return dict(found)


def render(
  config: TransformerConfig, carried: Mapping[str, Any] | None = None
) -> dict[str, Any]:
  """The config.json of a model; `carried` adds fields of CARRIED.

  Raises InputError naming the field of ours that no family can express.
  """
  carried = dict(carried or {})
  for name in carried:
    if not _is_carried(name):
      raise InputError(f'{name}: not one of the fields {sorted(CARRIED)}')
  blocks = [b for s in config.segments() for b in s.blocks * s.repeat]
  family = _family(config, blocks)
  dense = _leading_dense(blocks)
  at = {f.ours: name for name, f in _MAPPED[family].items()}
  out = {'model_type': family, 'architectures': [_ARCHITECTURES[family]]}
  for path, name in at.items():
    value = _reach(config, path)
    if value is not REQUIRED:
      out[name] = value
  out['num_hidden_layers'] = len(blocks)
  out |= rope_json.render(config.attention.rope, family)
  out |= {'hidden_act': 'silu', 'attention_bias': False}
  if family == 'llama':
    out['num_key_value_heads'] = config.attention.kv_heads
    out['head_dim'] = config.attention.head_dim
    out['mlp_bias'] = False
  else:
    out |= _latent_fields(config, family, dense)
  return out | carried


def _reach(config, path):
  """The value at a dotted path, REQUIRED where a part is None."""
  for key in path.split('.'):
    if config is None:
      return REQUIRED
    config = getattr(config, key)
  return config


def _family(config, blocks) -> str:
  for i, block in enumerate(blocks):
    if block.attention != config.attention:
      raise InputError(f'layer {i}: its attention differs; not in these files')
    if block.residual != ResidualConfig():
      raise InputError(f'layer {i}: residual: not in these files')
    if block.norm_eps != config.norm_eps:
      raise InputError(f'layer {i}: norm_eps differs; not in these files')
  if not isinstance(config.attention, MLAConfig):
    if any(isinstance(b.ffn, MoEConfig) for b in blocks) or config.mtp.depth:
      raise InputError(
        'attention = gqa with moe or mtp: no Hugging Face family supported here'
        ' has both; use mla'
      )
    return 'llama'
  if config.attention.norm_eps != 1e-6:
    raise InputError(
      f'attention.norm_eps = {config.attention.norm_eps}: the released models'
      ' fix it to 1e-6'
    )
  softmax = config.moe and config.moe.router.scoring == 'softmax'
  return 'deepseek_v2' if softmax else 'deepseek_v3'


def _leading_dense(blocks) -> int:
  dense = [isinstance(b.ffn, FFNConfig) for b in blocks]
  count = dense.index(False) if False in dense else len(dense)
  if any(dense[count:]):
    raise InputError('layout: a dense layer follows a moe layer: not supported')
  for kind in (blocks[:count], blocks[count:]):
    if any(b.ffn != kind[0].ffn for b in kind):
      raise InputError('layout: layers of one kind differ in their ffn')
  return count


def _latent_fields(config, family, dense) -> dict:
  out = {
    'num_key_value_heads': config.attention.heads,
    'first_k_dense_replace': dense,
    'moe_layer_freq': 1,
  }
  moe = config.moe
  if config.ffn is None:
    out['intermediate_size'] = moe.width  # of no layer, but a needed field
  if family == 'deepseek_v2':
    return out | _v2_fields(config)
  interleaved = config.attention.rope.interleaved
  out |= {
    'scoring_func': 'sigmoid',
    'topk_method': 'noaux_tc',
    'rope_interleave': interleaved,
    'num_nextn_predict_layers': config.mtp.depth,
  }
  if moe is None:
    return out | _no_moe()
  _require(moe.router.bias, 'moe.router.bias', True)
  _require(moe.router.group_score, 'moe.router.group_score', 'top2')
  groups = {'n_group': moe.router.groups, 'topk_group': moe.router.top_groups}
  if moe.experts // moe.router.groups < 2:
    raise InputError('moe.experts: deepseek_v3 needs two experts in a group')
  return out | groups


def _v2_fields(config) -> dict:
  router = config.moe.router
  _require(router.bias, 'moe.router.bias', False)
  _require(config.mtp.depth, 'mtp.depth', 0)
  _require(
    config.attention.rope.interleaved, 'attention.rope.interleaved', True
  )
  if router.normalize and config.moe.top_k > 1:
    _require(router.scale, 'moe.router.scale', 1.0)
  grouped = router.groups > 1
  if grouped:
    _require(router.group_score, 'moe.router.group_score', 'max')
  return {
    'scoring_func': 'softmax',
    'topk_method': 'group_limited_greedy' if grouped else 'greedy',
    'n_group': router.groups,
    'topk_group': router.top_groups,
  }


def _no_moe() -> dict:
  """What a deepseek_v3 without MoE layers says of the MoE that it lacks."""
  return {
    'n_routed_experts': 2,
    'num_experts_per_tok': 1,
    'moe_intermediate_size': 1,
    'n_shared_experts': 1,
    'routed_scaling_factor': 1.0,
    'norm_topk_prob': True,
    'n_group': 1,
    'topk_group': 1,
  }


def _require(value, name, wanted):
  if value != wanted:
    raise InputError(
      f'{name} = {value!r}: files of this family know only {wanted!r}'
    )


def without_mtp(config: TransformerConfig) -> TransformerConfig:
  """The model without its multi-token prediction."""
  return dataclasses.replace(config, mtp=MTPConfig(depth=0))
