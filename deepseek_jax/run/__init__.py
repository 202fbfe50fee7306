"""The parts of a training run; `deepseek_jax.loop` puts them together."""
