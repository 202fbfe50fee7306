"""Runs a launcher by its name.

    deepseek-jax pretrain --config=v3_tiny --workdir=runs/mine
    deepseek-jax pretrain --config=v3_tiny --help
    deepseek-jax plan --config=v3 --cluster=h800x2048

A launcher is a module of this package with a function run();
`python -m experiments.VERB` runs the same in the repository.
"""

import ast
import difflib
import importlib
import sys
from pathlib import Path

from deepseek_jax.cli import pipes
from deepseek_jax.version import __version__

_HELP = ('help', '--help', '-h', '-help', '--helpfull', '--helpshort')
_VERSION = ('version', '--version', '-version', '-V')


def verbs() -> dict[str, str]:
  """Returns the launchers: name -> the first line of what it does.

  Reads the files, as importing them would load JAX.
  """
  out = {}
  for path in sorted(Path(__file__).parent.glob('[a-z]*.py')):
    tree = ast.parse(path.read_text('utf-8'))
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    if 'run' in functions and path.stem != Path(__file__).stem:
      lines = (ast.get_docstring(tree) or '').splitlines() or ['']
      out[path.stem] = lines[0]
  return out


def usage() -> str:
  """Returns what --help of the program says."""
  known = verbs()
  width = max(map(len, known))
  lines = [f'  {name:{width}}  {what}' for name, what in known.items()]
  return '\n'.join(
    [
      f'deepseek-jax {__version__}',
      '',
      'deepseek-jax VERB --flag=value …',
      '',
      *lines,
      '',
      'deepseek-jax VERB --help lists the flags of one; with --config=NAME it'
      ' lists',
      'every field of the configuration, too.',
    ]
  )


def _refuse(line: str) -> None:
  """Ends the program with one line and status 2."""
  print(f'error: {line}', file=sys.stderr)
  sys.exit(2)


def run() -> None:
  """Runs the launcher that the first argument names."""
  verb, *rest = sys.argv[1:] or ['help']
  if verb in _HELP:
    try:
      print(usage(), flush=True)
    except BrokenPipeError:
      pipes.end_quietly()
    return
  if verb in _VERSION:
    print(f'deepseek-jax {__version__}')
    return
  known = verbs()
  name = verb.replace('-', '_')
  if name not in known:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]}? ' if near else ''
    _refuse(
      f'{verb!r}: no such verb; {hint}there are {", ".join(known)}'
      ' (deepseek-jax --help)'
    )
  sys.argv = [f'deepseek-jax {name}', *rest]
  importlib.import_module(f'deepseek_jax.cli.{name}').run()


if __name__ == '__main__':
  run()
