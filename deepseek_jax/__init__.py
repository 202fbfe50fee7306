"""deepseek_jax: efficient sparse transformers in JAX.

import deepseek_jax as ds
config = ds.presets.v3_tiny()
model = ds.build(config)
variables = model.init(jax.random.key(0))
out = model.apply(variables, tokens)
"""

from deepseek_jax import hf, plan, presets
from deepseek_jax.config import changed, from_dict, to_dict
from deepseek_jax.errors import InputError
from deepseek_jax.infer.sampling import SampleConfig, generate, stream
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.transformer import (
  Model,
  Output,
  TransformerConfig,
  build,
  moe_statistics,
)
