"""Converts Hugging Face checkpoints from and to configuration and variables."""

from deepseek_jax.hf.loading import load
from deepseek_jax.hf.saving import save
from deepseek_jax.hf.store import restore
from deepseek_jax.hf.verify import certify
