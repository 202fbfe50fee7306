"""Installs the wheel into bare environments and uses it from another folder.

    python -m tests.package.run [3.12 …]

Each environment has the wheel and what it needs, nothing of the repository. The
folder that it is used in has an `experiments/` of its user's. Without arguments
every Python of 3.11, 3.12 and 3.13 that is there takes part; one that is asked
for and absent, or none at all, is one line and status 2.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ('3.11', '3.12', '3.13')
PACKAGES = {'deepseek_jax', 'pallas_kernels'}
_TINY = (
  '--config.model.vocab_size=261',
  '--config.model.dim=32',
  "--config.model.layout=((('dense','moe'),1),)",
  '--config.model.ffn.width=32',
  '--config.model.moe.width=16',
  '--config.data.tokenizer=bytes',
  '--config.data.vocab_size=261',
  '--config.data.seq_len=64',
  '--config.data.heldout_fraction=0.3',
  '--config.train.tokens=768',
  '--config.train.batch.size=4',
  '--config.evaluate.every=0',
)
# What a user runs, in the user's folder.
COMMANDS = (
  ('version',),
  ('pretrain', '--config=v3_tiny', '--config.data.path=text', *_TINY,
   '--workdir=run'),
  ('sample', '--workdir=run', '--prompt=def f(', '--max_new_tokens=8'),
  ('plan', '--config=v4_tiny'),
  ('plan', '--config=v3', '--cluster=h800x2048', '--json=plan.json'),
)  # fmt: skip


def interpreter(version: str) -> str | None:
  """Returns the path of a Python that runs as that version, or None."""
  found = [shutil.which(f'python{version}')]
  pyenv = Path(os.environ.get('PYENV_ROOT') or Path.home() / '.pyenv')
  places = (pyenv / 'versions').glob(f'{version}.*/bin/python')
  found += map(str, sorted(places))
  code = 'import sys; print("%d.%d" % sys.version_info[:2])'
  for path in filter(None, found):
    # A shim of pyenv is there for versions that are not chosen, too.
    done = subprocess.run([path, '-c', code], capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.strip() == version:
      return path
  return None


def chosen(asked: list[str]) -> dict[str, str]:
  """Returns version -> interpreter; ends with status 2 where one is missing."""
  there = {v: interpreter(v) for v in asked or VERSIONS}
  missing = [v for v, path in there.items() if path is None]
  found = {v: path for v, path in there.items() if path}
  if missing and (asked or not found):
    print(
      f'error: python {", ".join(missing)}: no such interpreter on PATH or in'
      f' pyenv; install it, or name one that is there:'
      f' make package PYTHONS="{" ".join(found) or "3.X"}"',
      file=sys.stderr,
    )
    sys.exit(2)
  for version in missing:
    print(f'python {version}: not there, left out')
  return found


def wheel(folder: Path) -> Path:
  """Builds the wheel of a copy of the sources; returns its path."""
  source = folder / 'source'
  source.mkdir()
  for name in (*sorted(PACKAGES), 'experiments'):
    skip = shutil.ignore_patterns('__pycache__')
    shutil.copytree(ROOT / name, source / name, ignore=skip)
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source / name)
  subprocess.run(
    [
      sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps',
      '--no-build-isolation', f'--wheel-dir={folder}', str(source),
    ],
    check=True,
  )  # fmt: skip
  (made,) = folder.glob('*.whl')
  return made


def user_folder(path: Path) -> None:
  """Makes a user's folder: texts, and an `experiments` of the user's own."""
  (path / 'experiments').mkdir(parents=True)
  (path / 'experiments' / '__init__.py').write_text('MINE = True\n')
  (path / 'text').mkdir()
  for i in range(10):
    body = ''.join(f'def f{j}(x):\n  return x + {i}\n\n' for j in range(30))
    (path / 'text' / f'm{i}.py').write_text(body)


def use(made: Path, python: str, folder: Path) -> None:
  """Installs the wheel for one Python, and runs what a user runs."""
  environment, mine = folder / 'environment', folder / 'mine'
  subprocess.run([python, '-m', 'venv', environment], check=True)
  bin_ = environment / 'bin'
  subprocess.run([bin_ / 'pip', 'install', '--quiet', str(made)], check=True)
  user_folder(mine)
  env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
  env |= {'XDG_CACHE_HOME': str(folder / 'cache'), 'JAX_PLATFORMS': 'cpu'}
  own = 'import experiments; assert experiments.MINE'
  subprocess.run([bin_ / 'python', '-c', own], cwd=mine, env=env, check=True)
  for command in COMMANDS:
    print(f'$ deepseek-jax {" ".join(command)}', flush=True)
    subprocess.run(
      [bin_ / 'deepseek-jax', *command],
      cwd=mine,
      env=env,
      check=True,
      stdout=subprocess.DEVNULL,
    )


def main() -> None:
  """Checks the wheel on every Python that is asked for, or there."""
  found = chosen(sys.argv[1:])
  with tempfile.TemporaryDirectory() as folder:
    made = wheel(Path(folder))
    for version, python in found.items():
      start = time.monotonic()
      with tempfile.TemporaryDirectory() as inner:
        use(made, python, Path(inner))
      print(f'python {version}: whole, {time.monotonic() - start:.0f} s')


if __name__ == '__main__':
  main()
