"""Runs a launcher's main on wrong flags, many times in one process.

Reads [verb, [{flag: value}, ...]] from stdin and prints the lines that it ends
with: two launchers define the same flags, so each has a process.
"""

import importlib
import json
import sys

from absl import flags
from absl.testing import flagsaver

import deepseek_jax as ds


def main():
  verb, cases = json.load(sys.stdin)
  launcher = importlib.import_module(f'deepseek_jax.cli.{verb}')
  flags.FLAGS(['test'])
  said = []
  for given in cases:
    with flagsaver.flagsaver(**given):
      try:
        launcher.main([])
        said.append('')
      except ds.InputError as error:
        said.append(str(error))
  print(json.dumps(said))


if __name__ == '__main__':
  main()
