"""Converts config.json of DeepSeek-V4 from and to TransformerConfig.

Two spellings are read: the released one (compress_ratios, num_hash_layers,
rope_scaling) and that of transformers (layer_types, mlp_layer_types,
compress_rates, rope_parameters). What transformers would fill in for an absent
layer pattern is not the pattern of either released model, so it must be there.
Both spellings of the pattern are written; transformers takes its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_fields, rope_json
from deepseek_jax.hf.config_limits import error as _error
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.rope import RopeConfig, YarnConfig
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.presets import v4_kinds

# Numbers that every file must give.
_INTEGERS = (
  'vocab_size',
  'hidden_size',
  'moe_intermediate_size',
  'num_hidden_layers',
  'num_attention_heads',
  'head_dim',
  'q_lora_rank',
  'num_experts_per_tok',
  'n_routed_experts',
  'n_shared_experts',
  'hc_mult',
  'hc_sinkhorn_iters',
  'sliding_window',
  'o_groups',
  'o_lora_rank',
  'index_n_heads',
  'index_head_dim',
  'index_topk',
)
_FLOATS = ('routed_scaling_factor', 'hc_eps', 'swiglu_limit', 'rms_norm_eps')
_FIXED = {
  'hidden_act': ('silu',),
  'attention_bias': (False,),
  'mlp_bias': (False,),
  'attention_dropout': (0, None),
  'norm_topk_prob': (True,),
  'topk_method': ('noaux_tc',),
  'num_key_value_heads': (1,),
  'moe_layer_freq': (1,),
  'pretraining_tp': (1, None),
}
_READ = {
  'model_type',
  'architectures',
  'quantization_config',
  'initializer_range',
  'tie_word_embeddings',
  'scoring_func',
  'num_nextn_predict_layers',
  'compress_ratios',
  'compress_rates',
  'layer_types',
  'mlp_layer_types',
  'num_hash_layers',
  'rope_theta',
  'compress_rope_theta',
  'rope_scaling',
  'rope_parameters',
  'qk_rope_head_dim',
  'partial_rotary_factor',
}
# Fields of training or serving, or ones that the tensors repeat.
CARRIED = {
  'expert_dtype',
  'router_aux_loss_coef',
  'router_jitter_noise',
  'max_position_embeddings',
}
_TYPES = {
  'sliding_attention': 'window',
  'compressed_sparse_attention': 'csa',
  'heavily_compressed_attention': 'hca',
}
_NAMES = {ours: theirs for theirs, ours in _TYPES.items()}


def of_drafter(name: str) -> bool:
  """Returns whether a field is of the DSpark drafter of later V4 releases."""
  return name.startswith('dspark_')


def check_names(fields: Mapping[str, Any]) -> None:
  """Raises InputError for a field that is unknown or has an unknown value."""
  known = {*_INTEGERS, *_FLOATS, *_FIXED, *_READ, *CARRIED}
  for name, value in fields.items():
    if name.startswith('_'):
      continue
    if name not in known and not config_fields.is_carried(name):
      raise _error(name, value, 'not understood for deepseek_v4; not supported')
    if name in _FIXED and value not in _FIXED[name]:
      raise _error(name, value, f'not supported; must be {_FIXED[name][0]!r}')


def _number(fields: Mapping[str, Any], name: str, kind: type) -> int | float:
  """Returns a field as a number of `kind`; InputError where it is missing."""
  value = fields.get(name)
  if value is None:
    raise InputError(f'config.json: {name}: missing')
  if isinstance(value, bool) or not isinstance(
    value, (int, float) if kind is float else int
  ):
    raise _error(name, value, f'must be {kind.__name__}')
  return kind(value)


def parse(fields: Mapping[str, Any]) -> TransformerConfig:
  """Returns the model of a config.json whose names are checked."""
  n = {name: _number(fields, name, int) for name in _INTEGERS}
  n |= {name: _number(fields, name, float) for name in _FLOATS}
  tied = fields.get('tie_word_embeddings', False)
  if type(tied) is not bool:
    raise _error('tie_word_embeddings', tied, 'must be true or false')
  try:
    return _model(fields, n, tied)
  except InputError as error:
    text = str(error)
    text = text if text.startswith('config.json') else f'config.json: {text}'
    raise InputError(text) from None


def _model(
  fields: Mapping[str, Any], n: Mapping[str, Any], tied: bool
) -> TransformerConfig:
  """Returns the model of the parsed numbers `n`."""
  names, rates = _layers(fields, n['num_hidden_layers'])
  depth, init = 0, 0.02
  if fields.get('num_nextn_predict_layers') is not None:
    depth = _number(fields, 'num_nextn_predict_layers', int)
  if fields.get('initializer_range') is not None:
    init = _number(fields, 'initializer_range', float)
  return TransformerConfig(
    vocab_size=n['vocab_size'],
    dim=n['hidden_size'],
    layout=compact(names),
    attention=_attention(fields, n, rates),
    moe=_moe(fields, n),
    residual=HyperConnectionsConfig(
      streams=n['hc_mult'],
      iterations=n['hc_sinkhorn_iters'],
      eps=n['hc_eps'],
      norm_eps=n['rms_norm_eps'],
    ),
    kinds=v4_kinds(n['vocab_size']),
    mtp=MTPConfig(depth=depth, block='window', streams=True),
    norm_eps=n['rms_norm_eps'],
    init_std=init,
    tied=tied,
  )


def _attention(
  fields: Mapping[str, Any], n: Mapping[str, Any], rates: Mapping[str, int]
) -> SharedKVConfig:
  """Returns the attention; `rates` are tokens of an entry by kind."""
  near, far = _ropes(fields)
  return SharedKVConfig(
    heads=n['num_attention_heads'],
    head_dim=n['head_dim'],
    rope_dim=_rope_dim(fields, n['head_dim']),
    q_rank=n['q_lora_rank'],
    groups=n['o_groups'],
    o_rank=n['o_lora_rank'],
    window=n['sliding_window'],
    rope=near,
    compress_rope=far,
    csa=CSAConfig(
      ratio=rates['csa'],
      top_k=n['index_topk'],
      index_heads=n['index_n_heads'],
      index_dim=n['index_head_dim'],
    ),
    hca=HCAConfig(rates['hca']),
    norm_eps=n['rms_norm_eps'],
  )


def _moe(fields: Mapping[str, Any], n: Mapping[str, Any]) -> MoEConfig:
  """Returns the mixture of experts."""
  return MoEConfig(
    experts=n['n_routed_experts'],
    top_k=n['num_experts_per_tok'],
    width=n['moe_intermediate_size'],
    shared=n['n_shared_experts'],
    router=RouterConfig(
      scoring=_scoring(fields), scale=n['routed_scaling_factor']
    ),
    balance=BalanceConfig(sequence=1e-4),
    limit=n['swiglu_limit'],
  )


def _scoring(fields: Mapping[str, Any]) -> str:
  """Returns the router's scoring function by name."""
  value = fields.get('scoring_func', 'sqrtsoftplus')
  if value not in ('sqrtsoftplus', 'sigmoid', 'softmax'):
    raise _error(
      'scoring_func', value, 'must be sqrtsoftplus, sigmoid or softmax'
    )
  return value


def _rope_dim(fields: Mapping[str, Any], head_dim: int) -> int:
  """Returns how many channels are rotated, given outright or as a share."""
  dim = share = None
  if fields.get('qk_rope_head_dim') is not None:
    dim = _number(fields, 'qk_rope_head_dim', int)
  if fields.get('partial_rotary_factor') is not None:
    share = _number(fields, 'partial_rotary_factor', float)
  if dim is None and share is None:
    raise InputError('config.json: qk_rope_head_dim: missing')
  if share is not None:
    counted = int(head_dim * share)
    if dim not in (None, counted):
      raise _error('partial_rotary_factor', share, f'makes {counted} of {dim}')
    return counted
  return dim


def _ropes(fields: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
  """Returns ropes of layers with a window alone, and of those with entries."""
  given = dict(rope_json.mapping(fields, 'rope_parameters'))
  near_theta = fields.get('rope_theta', 10000.0)
  far_theta = fields.get('compress_rope_theta', 160000.0)
  if isinstance(given.get('main'), Mapping):
    near = _rope(given['main'], near_theta, 'rope_parameters.main')
    far = given.get('compress')
    if not isinstance(far, Mapping):
      raise _error('rope_parameters.compress', far, 'must be an object')
    far = _rope(far, far_theta, 'rope_parameters.compress')
    if near.scaling is not None:
      raise _error('rope_parameters.main', given['main'], 'must be default')
    return near, far
  name = 'rope_parameters' if given else 'rope_scaling'
  flat = given or dict(rope_json.mapping(fields, 'rope_scaling'))
  flat.pop('rope_theta', None)  # the base of layers with a window alone
  return _rope({}, near_theta, name), _rope(flat, far_theta, name)


def _rope(found: Mapping[str, Any], theta: float, where: str) -> RopeConfig:
  """Returns a rope as the released code computes it."""
  found = {k: v for k, v in found.items() if k != 'partial_rotary_factor'}
  found.setdefault('rope_theta', theta)
  made = rope_json.parse({'rope_parameters': found}, 'deepseek_v4')
  scaling = made.scaling
  if scaling is not None:
    # The released code multiplies cos and sin by nothing, whatever mscale says.
    factor = scaling.attention_factor
    scaling = YarnConfig(
      factor=scaling.factor,
      original_length=scaling.original_length,
      beta_fast=scaling.beta_fast,
      beta_slow=scaling.beta_slow,
      mscale=None,
      mscale_all_dim=None,
      attention_factor=1.0 if factor is None else factor,
    )
  return RopeConfig(theta=made.theta, interleaved=True, scaling=scaling)


def _layers(
  fields: Mapping[str, Any], count: int
) -> tuple[list[str], dict[str, int]]:
  """Returns the kind of every layer, and tokens of an entry by kind."""
  rates = dict(rope_json.mapping(fields, 'compress_rates'))
  rates = {
    'csa': rates.pop('compressed_sparse_attention', 4),
    'hca': rates.pop('heavily_compressed_attention', 128),
    **rates,
  }
  if set(rates) != {'csa', 'hca'}:
    raise _error('compress_rates', fields['compress_rates'], 'unknown layers')
  for kind, value in rates.items():
    if type(value) is not int:
      raise _error('compress_rates', value, f'must be a whole number ({kind})')
  types = _listed(fields, 'layer_types', str)
  ratios = _listed(fields, 'compress_ratios', int)
  if types is not None:
    kinds = [_TYPES.get(t) for t in types]
  elif ratios is not None:
    by_ratio = {0: 'window', rates['csa']: 'csa', rates['hca']: 'hca'}
    kinds = [by_ratio.get(r) for r in ratios[:count]]
    # MTP layers follow in the list; they have a window alone.
    if any(ratios[count:]):
      raise _error('compress_ratios', ratios, 'layers after the last must be 0')
  else:
    raise InputError('config.json: compress_ratios: missing')
  if len(kinds) != count or None in kinds:
    raise _error(
      'layer_types' if types is not None else 'compress_ratios',
      types if types is not None else ratios,
      f'must name a known kind for each of {count} layers',
    )
  return _hashed(fields, kinds), rates


def _listed(fields: Mapping[str, Any], name: str, kind: type) -> list | None:
  """Returns a list of numbers or texts, or None."""
  value = fields.get(name)
  if value is not None and (
    not isinstance(value, list | tuple)
    or any(type(v) is not kind for v in value)
  ):
    raise _error(name, value, f'must be a list of {kind.__name__}')
  return value


def _hashed(fields: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
  """Returns the kinds of layers, those with hash routing marked."""
  ffns = _listed(fields, 'mlp_layer_types', str)
  if ffns is None:
    hashed = _number(fields, 'num_hash_layers', int)
    ffns = ['hash_moe'] * hashed + ['moe'] * (len(kinds) - hashed)
  if len(ffns) < len(kinds) or set(ffns) - {'hash_moe', 'moe'}:
    raise _error('mlp_layer_types', ffns, 'must be hash_moe or moe per layer')
  hashed = [f == 'hash_moe' for f in ffns]
  return [k + '_hash' * h for k, h in zip(kinds, hashed)]


def compact(names: list[str]) -> tuple:
  """Returns a layout of these blocks, with what repeats written once."""
  out, at = [], 0
  while at < len(names):
    # The pattern of at most 4 blocks whose repeats cover most layers.
    best = (1, 1)
    for width in range(1, 5):
      pattern, times = names[at : at + width], 1
      while names[at + times * width : at + (times + 1) * width] == pattern:
        times += 1
      if times > 1 and width * times > best[0] * best[1]:
        best = (width, times)
    width, times = best
    out.append((tuple(names[at : at + width]), times))
    at += width * times
  return tuple(out)


def render(config: TransformerConfig) -> dict[str, Any]:
  """Returns the fields of a model; InputError names what has none."""
  names = [n for pattern, repeat in config.layout for n in pattern * repeat]
  kinds = v4_kinds(config.vocab_size)
  for name in {*names, config.mtp.block}:
    if config.kinds.get(name) != kinds.get(name):
      raise InputError(
        f'kinds.{name}: not in these files; see presets.v4_kinds'
      )
  _require_plain(config)
  a, moe, hc = config.attention, config.moe, config.residual
  ratio = {'window': 0, 'csa': a.csa.ratio, 'hca': a.hca.ratio}
  plain = [n.removesuffix('_hash') for n in names]
  out = {
    'model_type': 'deepseek_v4',
    'architectures': ['DeepseekV4ForCausalLM'],
    'vocab_size': config.vocab_size,
    'hidden_size': config.dim,
    'moe_intermediate_size': moe.width,
    'num_hidden_layers': len(names),
    'num_attention_heads': a.heads,
    'num_key_value_heads': 1,
    'head_dim': a.head_dim,
    'qk_rope_head_dim': a.rope_dim,
    'q_lora_rank': a.q_rank,
    'num_experts_per_tok': moe.top_k,
    'n_routed_experts': moe.experts,
    'n_shared_experts': moe.shared,
    'scoring_func': moe.router.scoring,
    'norm_topk_prob': True,
    'topk_method': 'noaux_tc',
    'routed_scaling_factor': moe.router.scale,
    'hc_mult': hc.streams,
    'hc_sinkhorn_iters': hc.iterations,
    'hc_eps': hc.eps,
    'swiglu_limit': moe.limit,
    'sliding_window': a.window,
    'o_groups': a.groups,
    'o_lora_rank': a.o_rank,
    'index_n_heads': a.csa.index_heads,
    'index_head_dim': a.csa.index_dim,
    'index_topk': a.csa.top_k,
    'num_nextn_predict_layers': config.mtp.depth,
    'rms_norm_eps': config.norm_eps,
    'initializer_range': config.init_std,
    'tie_word_embeddings': config.tied,
    'hidden_act': 'silu',
    'attention_bias': False,
    'compress_ratios': [ratio[p] for p in plain] + [0] * config.mtp.depth,
    'layer_types': [_NAMES[p] for p in plain],
    'compress_rates': {
      'compressed_sparse_attention': a.csa.ratio,
      'heavily_compressed_attention': a.hca.ratio,
    },
    'mlp_layer_types': [
      'hash_moe' if n.endswith('_hash') else 'moe' for n in names
    ],
  }
  return out | _render_rope(a)


def _render_rope(attention: SharedKVConfig) -> dict[str, Any]:
  """Returns the fields of both ropes."""
  near, far = attention.rope, attention.compress_rope
  out = rope_json.render(far, 'deepseek_v4')
  return out | {'rope_theta': near.theta, 'compress_rope_theta': far.theta}


def _require_plain(config: TransformerConfig) -> None:
  """Raises InputError for settings that files of V4 cannot express."""
  a, router, hc = config.attention, config.moe.router, config.residual
  if not isinstance(hc, HyperConnectionsConfig):
    raise InputError('residual: files of deepseek_v4 have hyper-connections')
  far = a.compress_rope.scaling
  yarn = far is None or (
    isinstance(far, YarnConfig) and far.attention_factor is not None
  )
  wanted = {
    'attention.compress': (a.compress, 'none'),
    'attention.csa.stage': (a.csa.stage, 'sparse'),
    'attention.rope.scaling': (a.rope.scaling, None),
    'attention.rope.interleaved': (a.rope.interleaved, True),
    'attention.compress_rope.interleaved': (a.compress_rope.interleaved, True),
    'attention.compress_rope.scaling (with attention_factor)': (yarn, True),
    'attention.norm_eps': (a.norm_eps, config.norm_eps),
    'residual.norm_eps': (hc.norm_eps, config.norm_eps),
    'moe.router.normalize': (router.normalize, True),
    'moe.router.bias': (router.bias, True),
    'moe.router.groups': (router.groups, 1),
    'moe.limit (a number)': (config.moe.limit is not None, True),
    'mtp.streams': (config.mtp.streams or not config.mtp.depth, True),
  }
  for name, (value, want) in wanted.items():
    if value != want:
      raise InputError(
        f'{name} = {value!r}: files of deepseek_v4 know only {want!r}'
      )
