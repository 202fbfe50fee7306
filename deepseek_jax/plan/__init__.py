"""What a configuration costs, from the configuration alone."""

from deepseek_jax.plan.parameters import ParameterCount, count_parameters
