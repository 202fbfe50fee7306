"""Reads the pages of docs/: what they link to, name, run and command.

Nothing here imports the library; names are looked up in the sources.
"""

import ast
import functools
import pathlib
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / 'docs'
_FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_LINK = re.compile(r'(?<!!)\[[^\]]*\]\(([^)\s]+)\)')
_SOURCE = re.compile(r'`([\w./-]+\.py)(?:::([\w.]+))?`')
_TEST = re.compile(r'`(tests/[\w/]+_test\.py)::([\w.]+)`')
_HEADING = re.compile(r'^#+ +(.*)$', re.MULTILINE)
_COMMAND = re.compile(r'python -m (experiments|benchmarks)\.(\w+)(.*)$')


class Block(NamedTuple):
  """Holds a fenced block: where it stands, its language, its text."""

  page: str
  line: int
  language: str
  text: str


def pages() -> dict[str, str]:
  """Returns the text of every page by its name below docs/."""
  return {
    str(path.relative_to(DOCS)): path.read_text()
    for path in sorted(DOCS.rglob('*.md'))
  }


def prose(text: str) -> str:
  """Returns a page without its fenced blocks."""
  return _FENCE.sub('', text)


def blocks(page: str, text: str) -> Iterator[Block]:
  """Yields the fenced blocks of a page."""
  for match in _FENCE.finditer(text):
    line = text.count('\n', 0, match.start()) + 2
    yield Block(page, line, match[1], textwrap.dedent(match[2]))


def anchors(text: str) -> set[str]:
  """Returns the anchors of a page's headings, as Markdown's toc makes them."""
  plain = lambda title: re.sub(r'[^\w\s-]', '', title.replace('`', ''))
  return {
    re.sub(r'[\s-]+', '-', plain(title).strip().lower())
    for title in _HEADING.findall(prose(text))
  }


def bad_links(texts: dict[str, str]) -> list[str]:
  """Returns a line for every link whose page or heading does not exist."""
  out = []
  for page, text in texts.items():
    for target in _LINK.findall(prose(text)):
      if '://' in target:
        continue
      name, _, anchor = target.partition('#')
      other = str((pathlib.PurePath(page).parent / name) if name else page)
      if other not in texts:
        out.append(f'{page}: {target}: no such page')
      elif anchor and anchor not in anchors(texts[other]):
        out.append(f'{page}: {target}: no such heading')
  return out


@functools.cache
def names(path: str) -> frozenset[str]:
  """Returns what a source file defines: functions, classes, methods, values."""
  found = set()
  tree = ast.parse((ROOT / path).read_text())
  for node in tree.body:
    if isinstance(node, ast.Assign):
      found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
      found.add(node.name)
    if isinstance(node, ast.ClassDef):
      inside = {n.name for n in node.body if isinstance(n, ast.FunctionDef)} | {
        n.target.id
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
      }
      # A test is named without its class.
      found |= inside | {f'{node.name}.{name}' for name in inside}
  return frozenset(found)


def bad_names(texts: dict[str, str]) -> list[str]:
  """Returns a line for every `file.py::name` of the prose that is not there."""
  out = []
  for page, text in texts.items():
    for path, name in _SOURCE.findall(prose(text)):
      if '/' not in path:
        continue  # a user's own file
      if not (ROOT / path).is_file():
        out.append(f'{page}: {path}: no such file')
      elif name and name not in names(path):
        out.append(f'{page}: {path}::{name}: no such name')
  return out


def tests_named(text: str) -> list[tuple[str, str]]:
  """Returns the (file, test) that a page names."""
  return _TEST.findall(text)


def commands(texts: dict[str, str]) -> list[tuple[str, str, str, str]]:
  """Returns (page, package, verb, arguments) of the commands in sh blocks."""
  out = []
  for page, text in texts.items():
    for block in blocks(page, text):
      if block.language != 'sh':
        continue
      for line in block.text.replace('\\\n', ' ').splitlines():
        match = _COMMAND.search(line.partition('  #')[0])
        if match:
          out.append((page, match[1], match[2], match[3].strip()))
  return out
