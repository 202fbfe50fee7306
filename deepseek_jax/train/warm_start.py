"""Begins with the weights of another run, new layers fresh.

So a trained dense model becomes a sparse one: all of the old run's arrays must
find their places; what the new model has besides (an indexer) keeps its
initialisation.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.errors import InputError


def variables(
  fresh: Mapping[str, Any], old: Mapping[str, Any], source: str
) -> tuple[Any, list[str]]:
  """Returns the fresh variables with those of an old run put in.

  Args:
    fresh: {'params': ..., 'buffers': ...} of the new model.
    old: the same of the run to begin with.
    source: where it is from, for messages.

  Returns:
    The variables, and the sorted names of what stayed fresh.

  Raises:
    InputError: an array of the old run has no place, or another shape.
  """
  # Every old array needs a place of its shape; new ones may stay fresh.
  new, given = (dict(_flat(tree)) for tree in (fresh, old))
  for name, array in given.items():
    if name not in new:
      raise InputError(
        f'init_from = {source!r}: {name} has no place in this model; the'
        ' configurations must agree but for layers that are new'
      )
    if new[name].shape != array.shape:
      raise InputError(
        f'init_from = {source!r}: {name} is {list(array.shape)} there and'
        f' {list(new[name].shape)} here; make the configurations agree'
      )
  merged = jax.tree_util.tree_map_with_path(
    lambda path, leaf: given.get(_name(path), leaf), fresh
  )
  return merged, sorted(set(new) - set(given))


def _flat(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields (dotted name, leaf) of a tree."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield _name(path), leaf


def _name(path: tuple) -> str:
  """Returns the dotted name of a path of a tree."""
  return jax.tree_util.keystr(path, simple=True, separator='.')


def check_tokenizer(mine: Any, theirs: Path) -> None:
  """Raises InputError unless both runs read text alike.

  Args:
    mine: the tokenizer of the run that begins.
    theirs: folder of the run that it begins with.

  Raises:
    InputError: their tokenizers differ.
  """
  with tempfile.TemporaryDirectory() as folder:
    mine.save(folder)
    saved = (Path(folder) / 'tokenizer.json').read_bytes()
  path = theirs / 'tokenizer.json'
  if not path.exists() or path.read_bytes() != saved:
    raise InputError(
      f'init_from = {str(theirs)!r}: its tokenizer is another; use the same'
      ' data.tokenizer, data.vocab_size and corpus'
    )
