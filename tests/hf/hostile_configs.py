"""Mutates the config.json of tiny folders; run as a program, bounded.

    python hostile_configs.py SEED COUNT [FAMILY ...]

Prints a JSON list of what was neither accepted nor refused in one line, each
as [family, path, value, what happened], and how many were accepted.
"""

import copy
import json
import os
import resource
import signal
import sys
import tempfile

import hf_models
import numpy as np

from deepseek_jax import hf
from deepseek_jax.errors import InputError
from deepseek_jax.hf import config_json
from deepseek_jax.hf.source import Source

SECONDS = 20  # of one configuration, on a busy machine
BYTES = 8 << 30  # of address space

_FIELDS = {
  'hidden_act': 'silu',
  'vocab_size': 24,
  'hidden_size': 16,
  'moe_intermediate_size': 8,
  'num_hidden_layers': 3,
  'num_attention_heads': 2,
  'num_experts_per_tok': 2,
  'n_routed_experts': 4,
  'n_shared_experts': 1,
  'q_lora_rank': 8,
  'qk_rope_head_dim': 4,
  'rms_norm_eps': 1e-6,
  'routed_scaling_factor': 1.5,
  'norm_topk_prob': True,
  'index_n_heads': 2,
  'index_head_dim': 8,
  'index_topk': 3,
}
V32 = _FIELDS | {
  'model_type': 'deepseek_v32',
  'intermediate_size': 12,
  'first_k_dense_replace': 1,
  'kv_lora_rank': 8,
  'qk_nope_head_dim': 4,
  'v_head_dim': 4,
  'n_group': 1,
  'topk_group': 1,
  'num_nextn_predict_layers': 0,
}
V4 = _FIELDS | {
  'model_type': 'deepseek_v4',
  'head_dim': 8,
  'compress_ratios': [0, 4, 8],
  'compress_rates': {
    'compressed_sparse_attention': 4,
    'heavily_compressed_attention': 8,
  },
  'num_hash_layers': 1,
  'sliding_window': 5,
  'o_groups': 2,
  'o_lora_rank': 4,
  'hc_mult': 2,
  'hc_sinkhorn_iters': 3,
  'hc_eps': 1e-6,
  'swiglu_limit': 10.0,
  'compress_rope_theta': 160000.0,
  'rope_scaling': {
    'type': 'yarn',
    'factor': 16,
    'original_max_position_embeddings': 64,
    'beta_fast': 32,
    'beta_slow': 1,
  },
}


def configs():
  """A tiny model of every family that is read."""
  parsed = {
    'v32': config_json.parse(V32).config,
    'v4': config_json.parse(V4).config,
  }
  return hf_models.FAMILIES | parsed


def folders(root, only=()):
  """{family: (folder, its config.json)}."""
  out = {}
  for family, config in configs().items():
    if only and family not in only:
      continue
    folder = os.path.join(root, family)
    hf.save(folder, config, hf_models.variables(config))
    with open(os.path.join(folder, 'config.json')) as file:
      out[family] = folder, json.load(file)
  return out


def paths(fields, above=()):
  """The path of every value, those inside of objects and lists too."""
  for key, value in fields.items():
    yield (*above, key)
    if isinstance(value, dict):
      yield from paths(value, (*above, key))
    elif isinstance(value, list) and value:
      yield (*above, key, 0)


def deep(levels):
  value = []
  for _ in range(levels):
    value = [value]
  return value


def values(draw, old):
  """A value that a file might have in place of `old`."""
  huge = [2**31, 2**53, 2**63, 2**64, 10**9, 10**18, 10**400]
  odd = [0, -1, 1, -(10**9), 3, 0.5, -0.0, 1e-300, 1e300, 1e-30, -1e-6]
  none = [None, True, False, '', 'x' * 3000, '\n\u2028\ud800', '7', 'nan']
  some = [[], {}, [1, 2], [None], {'a': {'b': [1]}}, deep(40), deep(400)]
  more = [float('nan'), float('inf'), float('-inf'), [10**9] * 300]
  near = []
  if isinstance(old, int | float) and not isinstance(old, bool):
    near = [old + 1, old * 2, old * 1000, -old, [old], {'a': old}, not old]
  elif isinstance(old, list):
    near = [old * 2, old[:-1], [*old, None], [str(v) for v in old], deep(2)]
  elif isinstance(old, str):
    near = [old.upper(), [old], {old: old}, old + '\0']
  pool = draw.choice(len(groups := [huge, odd, none, some, more, near or odd]))
  group = groups[pool]
  return group[draw.integers(len(group))]


_EXTRA = (
  'rope_scaling',
  'rope_parameters',
  'rope_theta',
  'quantization_config',
  'architectures',
  'model_type',
  'num_mtp_layers',
  'mlp_layer_types',
  'layer_types',
  'head_dim',
  'eos_token_id',
  'partial_rotary_factor',
  'qk_head_dim',
  'dspark_block_size',
  'unsloth_fixed',
  'num_nextn_predict_layers',
  'topk_method',
  'compress_rates',
  'num_key_value_heads',
  'num_local_experts',
  'decoder_sparse_step',
  'mlp_only_layers',
)


def mutated(draw, fields):
  """One or two changes, described as [path, value] of the last."""
  fields = copy.deepcopy(fields)
  for _ in range(draw.integers(1, 3)):
    every = [*paths(fields), *((name,) for name in _EXTRA)]
    path = every[draw.integers(len(every))]
    inner = fields
    for key in path[:-1]:
      inner = inner[key]
    known = inner.get(path[-1]) if isinstance(inner, dict) else inner[path[-1]]
    value = values(draw, known)
    inner[path[-1]] = value
    if draw.integers(12) == 0:
      fields[('a\n' * 50, '\ud800', 'x' * 10000)[draw.integers(3)]] = 1
  return fields, ['.'.join(map(str, path)), repr(value)[:60]]


def trial(folder, fields):
  """None if a folder with this config.json is refused in one line."""
  with open(os.path.join(folder, 'config.json'), 'w') as file:
    json.dump(fields, file)
  signal.alarm(SECONDS)
  try:
    Source(folder, mtp=None)
    return 'accepted'
  except InputError as error:
    text = str(error)
    return f'long: {text[:99]}' if len(text) > 2000 else None
  except BaseException as error:
    return f'{type(error).__name__}: {str(error)[:200]}'
  finally:
    signal.alarm(0)


def main(seed, count, *only):
  def late(*_):
    raise TimeoutError(f'no end after {SECONDS} s')

  signal.signal(signal.SIGALRM, late)
  resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
  draw, bad, accepted = np.random.default_rng(int(seed)), [], 0
  with tempfile.TemporaryDirectory() as root:
    every = list(folders(root, only).items())
    for n in range(int(count)):
      family, (folder, fields) = every[n % len(every)]
      changed, what = mutated(draw, fields)
      out = trial(folder, changed)
      if out == 'accepted':
        accepted += 1
      elif out:
        bad.append([family, *what, out])
  print(json.dumps({'bad': bad, 'accepted': accepted}))


if __name__ == '__main__':
  main(*sys.argv[1:])
