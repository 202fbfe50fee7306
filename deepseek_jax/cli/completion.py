"""Prints a script that completes verbs, flags and fields in bash or zsh.

    source <(deepseek-jax completion bash)
    deepseek-jax completion zsh > ~/.deepseek-jax && source ~/.deepseek-jax

The script holds every word, so that completing starts no Python. Print it anew
after an update.
"""

import ast
import dataclasses
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from deepseek_jax import config as configs
from deepseek_jax.cli import main as program
from deepseek_jax.errors import InputError
from deepseek_jax.run.config import RunConfig

SHELLS = ('bash', 'zsh')
_SHARED = ('help', 'version', 'quiet', 'verbose')
# Functions and modules by which a launcher gets flags that it does not define.
_BORROWED = {'define_config': ('config',), 'define_flag': ('config',)}


def flags_of(verb: str) -> list[str]:
  """Returns the names of a launcher's flags, read from its file."""
  here = Path(__file__).parent
  tree = ast.parse((here / f'{verb}.py').read_text('utf-8'))
  found = set(_SHARED)
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      name = getattr(node.func, 'attr', '')
      first = node.args[0] if node.args else None
      text = first.value if isinstance(first, ast.Constant) else None
      if name.startswith('DEFINE_') and isinstance(text, str):
        found.add(text)
      found |= {text} if name == 'define_config' and text else set()
      found |= set(_BORROWED.get(name, ()) if not text else ())
      if name == 'adopt_module_key_flags':
        found |= set(flags_of(first.id))
  return sorted(found)


def words(cls: type = RunConfig, path: str = 'config') -> Iterator[str]:
  """Yields --config.field= of every field of every kind, and its choices."""
  for field in dataclasses.fields(cls):
    hint = typing.get_type_hints(cls)[field.name]
    name, classes = f'{path}.{field.name}', configs.classes_of(hint)
    if classes:
      for kind in classes if len(classes) > 1 else ():
        yield f'--{name}.kind={configs.kind_name(kind)}'
      for kind in classes:
        yield from words(kind, name)
      continue
    chosen = [
      value
      for member in configs.alternatives(hint)
      if typing.get_origin(member) is Literal
      for value in typing.get_args(member)
    ]
    chosen += ['True', 'False'] if hint is bool else []
    yield from (f'--{name}={value}' for value in chosen or [''])


_BASH = """_deepseek_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} line=${{COMP_LINE:0:COMP_POINT}}
  word=${{line##* }}
  local verb=${{COMP_WORDS[1]}} all
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W '{verbs}' -- "$word")); return
  fi
  case "$verb" in
{cases}
  esac
  case "$word" in
    --config.*) all='{fields}';;
    --config=* | --versus=*)
      all='{configs}'
      [[ $verb == plan ]] && all+=' {presets}'
      all=${{all//--config=/${{word%%=*}}=}};;
  esac
  COMPREPLY=($(compgen -W "$all" -- "$word"))
  # Bash breaks words at =: what stands before it is there already.
  [[ $word == *=* && $COMP_WORDBREAKS == *=* ]] &&
    COMPREPLY=("${{COMPREPLY[@]#${{word%%=*}}=}}")
  [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]] && compopt -o nospace
  [[ ${{#COMPREPLY[@]}} == 0 ]] && COMPREPLY=($(compgen -f -- "${{word##*=}}"))
}}
complete -F _deepseek_jax deepseek-jax
"""


def script(shell: str) -> str:
  """Returns the script for a shell.

  Raises:
    InputError: it is neither bash nor zsh.
  """
  if shell not in SHELLS:
    raise InputError(
      f'{shell!r}: no such shell; name one of {", ".join(SHELLS)}'
    )
  from deepseek_jax.cli import named

  cases = []
  for verb in program.verbs():
    listed = ' '.join(f'--{name}=' for name in flags_of(verb))
    cases.append(f"    {verb}) all='{listed}';;")
  models = [name for name in named.PRESETS if name not in named.RECIPES]
  text = _BASH.format(
    verbs=' '.join(program.verbs()),
    cases='\n'.join(cases),
    fields=' '.join(dict.fromkeys(words())),
    configs=' '.join(f'--config={name}' for name in named.RECIPES),
    presets=' '.join(f'--config={name}' for name in models),
  )
  if shell == 'zsh':
    text = f'autoload -U +X bashcompinit && bashcompinit\n{text}'
  return text


def run() -> None:
  """Prints the script for the shell that the first argument names."""
  if sys.argv[1:2] in (['--help'], ['-h'], ['help']):
    print(__doc__, end='')
    return
  try:
    print(script(sys.argv[1] if len(sys.argv) > 1 else ''), end='')
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(error.status)
