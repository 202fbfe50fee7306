"""Takes one pass over a corpus: its hash, and how it splits into two parts."""

import math
from typing import NamedTuple

from deepseek_jax.data import corpus
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.left_out import LeftOut
from deepseek_jax.errors import InputError


class Census(NamedTuple):
  """Holds what one pass over the corpus finds."""

  sha256: str
  train: int  # documents
  heldout: int
  characters: int  # of the training documents
  nearest: float  # the least fraction that holds out a document
  left_out: str  # a line for the user, or ''
  files: int  # that were read


def census_of(config: DataConfig) -> Census:
  """Reads the corpus once; InputError if its split leaves a part empty."""
  digest, out = corpus.Digest(), LeftOut(', '.join(config.paths))
  train = heldout = characters = 0
  nearest = 1.0
  for doc in corpus.documents_of(config, out):
    digest.add(doc)
    # For the message: the fraction that would hold out one document.
    nearest = min(nearest, corpus.held_out_hash(doc.text))
    if corpus.is_held_out(doc.text, config.heldout_fraction):
      heldout += 1
    else:
      train += 1
      characters += len(doc.text)
  out.check_records(train + heldout)
  census = Census(
    digest.hexdigest(),
    train,
    heldout,
    characters,
    nearest,
    out.line(),
    out.read,
  )
  _check_split(config, census)
  return census


def _check_split(config: DataConfig, census: Census) -> None:
  """Raises InputError if the split leaves a part empty."""
  total = census.train + census.heldout
  fraction = f'data.heldout_fraction={config.heldout_fraction}'
  if not total:
    wrong = census.left_out or f'data.path={config.path!r}'
    raise InputError(
      f'{wrong}: has no text: give files with some: {corpus.KINDS}'
    )
  if not census.train:
    raise InputError(
      f'{fraction} holds out all {total} documents: lower it or add documents'
    )
  if config.heldout_fraction and not census.heldout:
    enough = math.floor(census.nearest * 100 + 1) / 100
    fix = f'{enough:.2f} or more, or to 0' if enough < 1 else '0'
    raise InputError(
      f'{fraction} holds out none of {total} documents: set it to {fix}'
      ' (0 with evaluate.every=0)'
    )
