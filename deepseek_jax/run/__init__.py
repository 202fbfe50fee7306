"""The parts of a training run; `deepseek_jax.run.fit` puts them together."""
