"""deepseek_jax: efficient sparse transformers in JAX.

import deepseek_jax as ds

config = ds.presets.v3_tiny()                # a model
model = ds.build(config)
variables = model.init(jax.random.key(0))
out = model.apply(variables, tokens)

run = ds.fit(ds.recipes.v3_tiny(), 'runs/v3')  # a run: model, data, training
loaded = ds.load('runs/v3')
"""

import ast
import importlib
import pathlib
import pkgutil
from typing import Any

from deepseek_jax.version import __version__


def _face() -> dict[str, tuple[str, str]]:
  """Returns name -> (module, its name there), as __init__.pyi has them."""
  stub = pathlib.Path(__file__).with_suffix('.pyi').read_text()
  return {
    alias.asname or alias.name: (node.module, alias.name)
    for node in ast.parse(stub).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
  }


_FACE = _face()
_PARTS = {module.name for module in pkgutil.iter_modules(__path__)}
__all__ = sorted(_FACE)


def __getattr__(name: str) -> Any:
  """Returns a name of the face, or a module; imports what it needs."""
  if name in _PARTS:
    return importlib.import_module(f'{__name__}.{name}')
  if name not in _FACE:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  module, own = _FACE[name]
  holder = importlib.import_module(module)
  if not hasattr(holder, own):  # a module that nothing has imported yet
    importlib.import_module(f'{module}.{own}')
  value = getattr(holder, own)
  globals()[name] = value
  return value


def __dir__() -> list[str]:
  """Returns the names of the face and of the modules."""
  return sorted({*globals(), *_FACE, *_PARTS})
