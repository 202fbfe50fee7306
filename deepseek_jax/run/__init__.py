"""Holds the parts of a training run; `deepseek_jax.run.fit` joins them."""
