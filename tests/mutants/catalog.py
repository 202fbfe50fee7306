"""All known bugs: those of every module here that has MUTANTS."""

import importlib
import pathlib

_HERE = pathlib.Path(__file__).parent
_MODULES = [
  importlib.import_module(f'tests.mutants.{path.stem}')
  for path in sorted(_HERE.glob('*.py'))
  if 'MUTANTS = (' in path.read_text() and path.stem != 'catalog'
]

MUTANTS = tuple(mutant for module in _MODULES for mutant in module.MUTANTS)
