"""Puts values into nested dicts by path."""

from collections.abc import Iterable, Mapping
from typing import Any


def put(tree: dict, path: Iterable, value: Any) -> None:
  """Sets tree[a][b][c] for the path (a, b, c); dicts in between are made."""
  *above, last = path
  for key in above:
    tree = tree.setdefault(key, {})
  tree[last] = value


def nested(flat: Mapping | Iterable[tuple]) -> dict:
  """Returns {(a, b): x} or pairs ((a, b), x) as {a: {b: x}}."""
  out: dict = {}
  for path, value in flat.items() if isinstance(flat, Mapping) else flat:
    put(out, path, value)
  return out
