"""Writes a big random checkpoint fast: python big_checkpoint.py DIR."""

import os
import sys

import numpy as np

from deepseek_jax.hf import saving
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.presets import layout

CONFIG = TransformerConfig(
  vocab_size=64000,
  dim=2048,
  layout=layout(1, 6),
  attention=MLAConfig(16, 512, 256, 64, 32, 64),
  ffn=FFNConfig(4096),
  moe=MoEConfig(
    experts=64, top_k=6, width=1408, router=RouterConfig(groups=4, top_groups=2)
  ),
)


def noise(leaf, region):
  """Small random numbers, different in every layer and expert."""
  shape = [s.stop - s.start for s in region]
  seed = [len(leaf.name), *(s.start for s in region)]
  line = np.random.default_rng(seed).standard_normal(8192, np.float32)
  return np.resize(line * np.float32(0.02), shape)


if __name__ == '__main__':
  os.makedirs(sys.argv[1], exist_ok=True)
  wanted = saving.Format('bfloat16', shard_bytes=2 << 30)
  saving.write(sys.argv[1], CONFIG, noise, wanted)
