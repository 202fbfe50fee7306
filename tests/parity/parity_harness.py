"""Random transformers models beside ours: same weights, same tokens.

Skips the importing test module where the extra [hf] is not installed.
"""

import functools
import tempfile
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.hf import saving
from deepseek_jax.model.transformer_config import TransformerConfig

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# These tests are compile time; the numbers don't need LLVM's best.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)

# float32 on both sides; a fault gives a thousand times more.
LOGITS_ATOL = 1e-4
GRAD_ATOL = 1e-4

_BASE = {
  'vocab_size': 61,
  'hidden_size': 32,
  'intermediate_size': 40,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'max_position_embeddings': 512,
  'attn_implementation': 'eager',
  'experts_implementation': 'eager',
}
_LATENT = {
  'q_lora_rank': 20,
  'kv_lora_rank': 24,
  'qk_nope_head_dim': 12,
  'qk_rope_head_dim': 8,
  'v_head_dim': 10,
  'first_k_dense_replace': 1,
  'moe_intermediate_size': 12,
  'n_routed_experts': 8,
  'num_experts_per_tok': 2,
  'n_shared_experts': 1,
}
_FAMILIES = {
  'v3': (
    transformers.DeepseekV3Config,
    transformers.DeepseekV3ForCausalLM,
    {**_LATENT, 'n_group': 4, 'topk_group': 2, 'routed_scaling_factor': 2.5},
  ),
  'v32': (
    transformers.DeepseekV32Config,
    transformers.DeepseekV32ForCausalLM,
    {
      **_LATENT,
      'n_group': 4,
      'topk_group': 2,
      # Enough that no query scores all keys 0: torch.topk takes any of equals.
      'index_n_heads': 20,
      'index_head_dim': 14,
      'index_topk': 6,
    },
  ),
  'v2': (
    transformers.DeepseekV2Config,
    transformers.DeepseekV2ForCausalLM,
    {**_LATENT, 'topk_method': 'greedy', 'n_group': 1, 'topk_group': 1},
  ),
  'llama': (
    transformers.LlamaConfig,
    transformers.LlamaForCausalLM,
    {'num_key_value_heads': 2},
  ),
  'qwen3_moe': (
    transformers.Qwen3MoeConfig,
    transformers.Qwen3MoeForCausalLM,
    {
      'num_key_value_heads': 2,
      'head_dim': 10,
      'moe_intermediate_size': 12,
      'num_experts': 8,
      'num_experts_per_tok': 3,
      'norm_topk_prob': True,
    },
  ),
}


def yarn(**fields) -> dict:
  """rope_scaling of a YaRN whose ramp lies inside of 8 rope channels."""
  return {
    'type': 'yarn',
    'factor': 8.0,
    'original_max_position_embeddings': 64,
    'beta_fast': 4,
    'beta_slow': 1,
    **fields,
  }


class Pair(NamedTuple):
  """One set of weights in both libraries."""

  theirs: Any
  config: TransformerConfig
  variables: dict


def make_theirs(family: str, seed: int = 0, **fields):
  """A random transformers model: no norm is one, no bias is zero."""
  config_class, model_class, defaults = _FAMILIES[family]
  fields = {**_BASE, **defaults, **fields}
  if family not in ('llama', 'qwen3_moe'):
    fields.setdefault('num_key_value_heads', fields['num_attention_heads'])
  with warnings.catch_warnings():
    # Without shared experts transformers makes matrices of no rows.
    warnings.filterwarnings('ignore', 'Initializing zero-element tensors')
    model = model_class(config_class(**fields)).float().eval()
  randomize(model, seed)
  return model


def randomize(model, seed: int) -> None:
  generator = torch.Generator().manual_seed(seed)
  draw = lambda like: torch.randn(like.shape, generator=generator)
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim == 1:
        p.copy_(1 + 0.3 * draw(p))
      elif 'mlp.gate.' in name:
        p.copy_(draw(p))  # scores far apart: no ties to be broken either way
      else:
        p.copy_(draw(p) * max(p.shape[-1], 1) ** -0.5)
    for name, b in model.named_buffers():
      if name.endswith('e_score_correction_bias'):
        # Below zero: a masked score of 0 would beat every biased one.
        b.copy_(0.3 * draw(b) - 1.5)


def pair(family: str, seed: int = 0, **fields) -> Pair:
  """Goes through a folder: transformers writes it, we read it."""
  theirs = make_theirs(family, seed, **fields)
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    config, variables = hf.load(folder)
  return Pair(theirs, config, variables)


def tokens(pair: Pair, batch: int = 2, length: int = 24, seed: int = 1):
  draw = np.random.default_rng(seed)
  return draw.integers(0, pair.config.vocab_size, (batch, length), np.int32)


def logits(pair: Pair, ids) -> np.ndarray:
  model = ds.build(pair.config)
  run = jit(lambda v, t: model.apply(v, t).logits)
  return np.asarray(run(pair.variables, ids))


def their_logits(pair: Pair, ids, **kwargs) -> np.ndarray:
  with torch.no_grad():
    return pair.theirs(torch.tensor(ids), **kwargs).logits.numpy()


def gradients(pair: Pair, ids) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Logits, and the mean next-token loss' gradients by names of the file."""
  model = ds.build(pair.config)

  def loss(params):
    out = model.apply({**pair.variables, 'params': params}, ids)
    log_probs = jax.nn.log_softmax(out.logits[:, :-1])
    chosen = jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1)
    return -chosen.mean(), out.logits

  grads, logits = jit(jax.grad(loss, has_aux=True))(pair.variables['params'])
  zeros = jax.tree.map(np.zeros_like, pair.variables['buffers'])
  variables = {'params': grads, 'buffers': zeros}
  return np.asarray(logits), saving.tensors(pair.config, variables)


def their_gradients(pair: Pair, ids) -> dict[str, np.ndarray]:
  pair.theirs.zero_grad()
  out = pair.theirs(torch.tensor(ids)).logits[:, :-1]
  target = torch.tensor(ids)[:, 1:].long()
  loss = torch.nn.functional.cross_entropy(
    out.reshape(-1, out.shape[-1]), target.reshape(-1)
  )
  loss.backward()
  named = {
    name: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy()
    for name, p in pair.theirs.named_parameters()
  }
  return unpacked(named)


def unpacked(named: dict) -> dict:
  """Splits transformers' packed experts into the tensors of a file."""
  out = {}
  for name, value in named.items():
    stem, _, last = name.rpartition('.')
    if last == 'gate_up_proj':
      for e, both in enumerate(value):
        gate, up = np.split(both, 2)
        out[f'{stem}.{e}.gate_proj.weight'] = gate
        out[f'{stem}.{e}.up_proj.weight'] = up
    elif last == 'down_proj':
      for e, one in enumerate(value):
        out[f'{stem}.{e}.down_proj.weight'] = one
    else:
      out[name] = value
  return out


def decoded(pair: Pair, ids, prompt: int) -> np.ndarray:
  """Our logits with a cache: the prompt at once, then token by token."""
  model = ds.build(pair.config)
  step = jit(lambda v, t, c: model.apply(v, t, cache=c))
  out = step(pair.variables, ids[:, :prompt], model.init_cache(*ids.shape))
  every = [out.logits]
  for at in range(prompt, ids.shape[1]):
    out = step(pair.variables, ids[:, at : at + 1], out.cache)
    every.append(out.logits)
  return np.concatenate(every, axis=1)


def their_decoded(pair: Pair, ids, prompt: int) -> np.ndarray:
  every, past = [], transformers.DynamicCache(config=pair.theirs.config)
  with torch.no_grad():
    for start in (0, *range(prompt, ids.shape[1])):
      stop = prompt if start == 0 else start + 1
      # By position: 5.24 gave the argument another name.
      more = torch.tensor(ids[:, start:stop])
      out = pair.theirs(more, None, None, past, use_cache=True)
      every.append(out.logits.numpy())
  return np.concatenate(every, axis=1)


def changed(pair: Pair, changes: dict) -> Pair:
  """The pair with fields of our configuration changed."""
  return pair._replace(config=ds.changed(pair.config, changes))
