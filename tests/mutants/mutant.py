"""A mutant: one published bug, as an edit of one file of the library."""

import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
  """One bug and the tests that have to notice it.

  Attributes:
    name: what is wrong, in a few words with underscores.
    path: the file, from the root of the repository.
    old: exact text that occurs once in it.
    new: what stands there instead.
    tests: 'file::part of a test name', from the root.
    origin: where the bug was seen, or which rule forbids it.
    fast: takes part in every run of the tests.
  """

  name: str
  path: str
  old: str
  new: str
  tests: tuple[str, ...]
  origin: str
  fast: bool = False


def mutated(mutant: Mutant, text: str) -> str:
  """The file's text with the bug; ValueError if the patch does not apply."""
  found = text.count(mutant.old)
  if found != 1 or mutant.old == mutant.new:
    raise ValueError(
      f'{mutant.name}: its old text occurs {found} times in {mutant.path};'
      ' write the patch anew for the present code'
    )
  return text.replace(mutant.old, mutant.new)


def selection(tests: tuple[str, ...]) -> list[str]:
  """Arguments of pytest that select 'file::part of a name' entries."""
  files = dict.fromkeys(test.partition('::')[0] for test in tests)
  names = dict.fromkeys(test.partition('::')[2] for test in tests)
  return [*files, '-k', ' or '.join(names)]
