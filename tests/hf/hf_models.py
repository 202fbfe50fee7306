"""Tiny models of every family, with random weights."""

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_jax as ds
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.rope import RopeConfig, YarnConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.presets import layout

V3 = ds.TransformerConfig(
  vocab_size=48,
  dim=24,
  layout=layout(1, 2),
  attention=MLAConfig(
    2, 12, 16, 6, 4, 8, RopeConfig(scaling=YarnConfig(factor=4.0))
  ),
  ffn=FFNConfig(20),
  moe=MoEConfig(4, 2, 8, router=RouterConfig(groups=2, scale=2.5)),
  mtp=MTPConfig(1),
)
V2 = ds.changed(
  V3,
  {
    'attention.q_rank': None,
    'moe.shared': 2,
    'moe.router': RouterConfig(
      'softmax', bias=False, normalize=False, group_score='max', scale=4.0
    ),
    'mtp.depth': 0,
  },
)
LLAMA = ds.TransformerConfig(
  vocab_size=48,
  dim=24,
  layout=layout(2, 0),
  attention=GQAConfig(4, 2, 10),
  ffn=FFNConfig(20),
  norm_eps=1e-5,
  tied=True,
)
QWEN3_MOE = ds.changed(
  V2,
  {
    'attention': GQAConfig(4, 2, 10, qk_norm=True),
    'layout': ((('dense', 'moe'), 2),),
    'moe.shared': 0,
    'moe.router.normalize': True,
    'moe.router.scale': 1.0,
  },
)
FAMILIES = {'v3': V3, 'v2': V2, 'llama': LLAMA, 'qwen3_moe': QWEN3_MOE}


def variables(config):
  """Every number random: no norm of one, no bias of zero."""
  shapes = jax.eval_shape(ds.build(config).init, jax.random.key(0))
  draw = np.random.default_rng(0)

  def make(a):
    if jnp.issubdtype(a.dtype, jnp.integer):  # numbers of experts
      return jnp.asarray(draw.integers(0, config.moe.experts, a.shape, a.dtype))
    return jnp.asarray(draw.standard_normal(a.shape, np.float32))

  return jax.tree.map(make, shapes)
