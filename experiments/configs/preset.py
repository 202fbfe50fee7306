"""Any preset with a recipe, for planning: --config=THIS_FILE:NAME.

experiments.plan finds it under the preset's bare name, --config=v3.
"""

import dataclasses

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.errors import InputError
from experiments import common

PRESETS = (
  'moe_16b',
  'v2_lite',
  'v2',
  'v3',
  'v3_tiny',
  'v32',
  'v4_flash',
  'v4_pro',
  'llama31_8b',
  'llama31_70b',
  'llama31_405b',
)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """A model and how it is trained."""

  model: ds.TransformerConfig
  recipe: plan.Recipe


def get_config(name: str):
  """The plan of a preset, as --config=NAME finds it."""
  if name not in PRESETS:
    raise InputError(f'--config={name}: presets are {", ".join(PRESETS)}')
  model = getattr(ds.presets, name)()
  model = ds.changed(
    model, {'compute.dtype': 'bfloat16', 'compute.remat': 'full'}
  )
  recipe = plan.v3_recipe() if name == 'v3' else plan.Recipe()
  return common.editable(PlanConfig(model, recipe))
