"""Resolves configurations by name: --config=v3_tiny works in any folder.

A launcher of runs takes a recipe; `plan` takes a recipe, or else a preset with
how it would be trained. ml_collections loads this file as it loads a user's.
"""

import dataclasses
import re
from types import ModuleType

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.errors import InputError


def _public(module: ModuleType) -> tuple[str, ...]:
  """Returns the functions that a module defines and that take nothing."""
  own = lambda f: (
    callable(f) and getattr(f, '__module__', '') == (module.__name__)
  )
  return tuple(
    name
    for name, value in vars(module).items()
    if own(value)
    and not name.startswith('_')
    and not isinstance(value, type)
    and not value.__code__.co_argcount
  )


RECIPES, PRESETS = _public(ds.recipes), _public(ds.presets)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """Holds a model and how it is trained."""

  model: ds.TransformerConfig
  recipe: plan.Recipe


def planned(name: str) -> PlanConfig:
  """Returns a preset in bfloat16, everything recomputed, and its recipe."""
  model = getattr(ds.presets, name)()
  model = ds.changed(
    model, {'compute.dtype': 'bfloat16', 'compute.remat': 'full'}
  )
  return PlanConfig(model, plan.v3_recipe() if name == 'v3' else plan.Recipe())


def is_name(value: str) -> bool:
  """Returns whether a value of --config is a name rather than a file."""
  return re.fullmatch(r'[A-Za-z_]\w*', value) is not None


def get_config(asked: str) -> ds.RunConfig | PlanConfig:
  """Returns the configuration 'run:NAME' or 'plan:NAME'.

  Raises:
    InputError: nothing has that name.
  """
  kind, _, name = asked.partition(':')
  if name in RECIPES:
    return getattr(ds.recipes, name)()
  if kind == 'plan' and name in PRESETS:
    return planned(name)
  known = f'recipes are {", ".join(RECIPES)}'
  if kind == 'plan':
    raise InputError(
      f'--config={name}: no such file or name; {known}; presets are'
      f' {", ".join(PRESETS)}'
    )
  if name in PRESETS:
    raise InputError(
      f'--config={name}: is a model without a recipe, which only plan takes;'
      f' {known}'
    )
  raise InputError(f'--config={name}: no such file or name; {known}')
