"""Builds the documentation into build/docs, offline, and checks all of it.

python docs/tools/build_site.py

Python blocks of a page run in order, in one process per page; blocks of the
language `py` are only compiled. Shell commands are parsed by the launchers that
they name. MkDocs then builds with every warning an error.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import config_fields
import pages

SITE = pages.ROOT / 'build' / 'docs'
_LOADED = re.compile(
  r'<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)="(https?://[^"]+)"'
)
_NEEDED = {'mkdocs': 'mkdocs', 'material': 'mkdocs-material'}
# Starts a launcher for each command line of stdin, in a child of its own; what
# would do the work only looks at the configuration.
_PARSE = """
import importlib, os, shlex, sys
verb = sys.argv[1]
launcher = importlib.import_module(f'deepseek_jax.cli.{verb}')
from deepseek_jax.cli import common
from deepseek_jax.run.config import RunConfig

def main(argv):
  if verb in ('pretrain', 'sweep'):
    common.frozen(RunConfig, launcher._CONFIG.value)

main.__module__ = launcher.__name__
launcher.main = main
common._keep_compiled_programs = lambda: None
flagged = sys.modules.get('deepseek_jax.cli.process_flags')
if flagged:
  flagged.join = lambda: None
status = 0
for line in sys.stdin.read().splitlines():
  child = os.fork()
  if not child:
    sys.argv = [verb, *shlex.split(line)]
    try:
      launcher.run()
      code = 0
    except SystemExit as end:
      code = end.code or 0
    if code:
      print(f'refused: {verb} {line}', file=sys.stderr, flush=True)
    os._exit(code)
  status |= os.waitpid(child, 0)[1]
sys.exit(bool(status))
"""


def missing() -> list[str]:
  """Returns the packages that the build needs and that are not installed."""
  return [p for m, p in _NEEDED.items() if importlib.util.find_spec(m) is None]


def environment() -> dict[str, str]:
  """Returns the environment of what runs: a CPU, quick compilation."""
  flags = (
    '--xla_backend_optimization_level=0'
    ' --xla_llvm_disable_expensive_passes=true'
  )
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'PYTHONPATH': str(pages.ROOT),
    'XLA_FLAGS': flags,
  }


def run_blocks(texts: dict[str, str]) -> list[str]:
  """Returns a line for every page whose Python blocks fail."""
  faults = []
  for page, text in texts.items():
    code = []
    for block in pages.blocks(page, text):
      if block.language == 'py':
        compile(block.text, f'{page}:{block.line}', 'exec')
      elif block.language == 'python':
        name = f'{page}:{block.line}'
        code.append(f'exec(compile({block.text!r}, {name!r}, "exec"))')
    if not code:
      continue
    print(f'{page}: {len(code)} blocks', flush=True)
    with tempfile.TemporaryDirectory() as folder:
      done = subprocess.run(
        [sys.executable, '-c', '\n'.join(code)],
        cwd=folder,
        env=environment(),
        check=False,
      )
    if done.returncode:
      faults.append(f'{page}: its Python blocks failed')
  return faults


def parse_commands(texts: dict[str, str]) -> list[str]:
  """Returns a line for every launcher that refuses a command of the pages."""
  by_verb: dict[str, list[str]] = {}
  for _, package, verb, arguments in pages.commands(texts):
    if package == 'experiments':
      by_verb.setdefault(verb, []).append(arguments)
  faults = []
  for verb, lines in sorted(by_verb.items()):
    print(f'{verb}: {len(lines)} commands', flush=True)
    done = subprocess.run(
      [sys.executable, '-c', _PARSE, verb],
      input='\n'.join(lines),
      text=True,
      cwd=pages.ROOT,
      env=environment(),
      check=False,
    )
    if done.returncode:
      faults.append(f'{verb}: refuses a command of docs/')
  return faults


def loads_elsewhere(html: str) -> list[str]:
  """Returns what a built page would load from other sites."""
  return _LOADED.findall(html)


def main() -> int:
  """Returns 0 if everything holds; prints a line for what does not."""
  absent = missing()
  if absent:
    print(
      f"docs need {', '.join(absent)}: pip install -e '.[docs]'",
      file=sys.stderr,
    )
    return 2
  texts = pages.pages()
  faults = pages.bad_links(texts) + pages.bad_names(texts)
  if config_fields.PAGE.read_text() != config_fields.page():
    faults.append(
      'docs/config.md is out of date: python docs/tools/config_fields.py'
    )
  faults += parse_commands(texts) + run_blocks(texts)
  built = subprocess.run(
    [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--quiet'],
    cwd=pages.ROOT,
    env=os.environ | {'NO_MKDOCS_2_WARNING': '1'},
    check=False,
  )
  if built.returncode:
    faults.append('mkdocs: see above')
  for path in sorted(SITE.rglob('*.html')):
    for address in loads_elsewhere(path.read_text()):
      faults.append(f'{path.name}: loads {address}')
  for line in faults:
    print(line, file=sys.stderr)
  if not faults:
    print(f'built {pathlib.Path(SITE).relative_to(pages.ROOT)}/index.html')
  return int(bool(faults))


if __name__ == '__main__':
  sys.exit(main())
