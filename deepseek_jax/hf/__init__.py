"""Hugging Face checkpoints <-> configuration and variables."""

from deepseek_jax.hf.load import load
from deepseek_jax.hf.save import save
