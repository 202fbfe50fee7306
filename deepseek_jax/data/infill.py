"""Cuts documents for fill-in-the-middle, prefix-suffix-middle (V3 section 4.1).

A document is cut at two random characters and read as
`<|fim_begin|> pre <|fim_hole|> suf <|fim_end|> mid <eos>`, before packing; so
the model learns to write what lies between two texts at no cost to next-token
prediction (arXiv:2207.14255).
"""

import random
from typing import NamedTuple

from deepseek_jax.data.corpus import Document, unit_hash
from deepseek_jax.data.tokenizer import FimIds


class FimSplit(NamedTuple):
  """Holds the three parts of a document."""

  pre: str
  mid: str
  suf: str


def fim(doc: Document, rate: float, seed: int) -> FimSplit | None:
  """Returns the split of a document, or None if it stays as it is.

  Looks at the name and the seed alone, so no document's fate depends on
  another's.

  Args:
    doc: the document.
    rate: the expected share of documents that are split.
    seed: of the draws.
  """
  if unit_hash('fim', str(seed), doc.name) >= rate:
    return None
  return split(doc.text, random.Random(f'{seed} {doc.name}'))


def split(text: str, rng: random.Random) -> FimSplit:
  """Cuts at two places drawn uniformly from the len(text) + 1 there are."""
  # random() is the one method whose stream Python promises to keep.
  a, b = sorted(int(rng.random() * (len(text) + 1)) for _ in range(2))
  return FimSplit(text[:a], text[a:b], text[b:])


def arrange(ids: tuple[list, list, list], marks: FimIds) -> list[int]:
  """Returns the ids of (pre, mid, suf) in prefix-suffix-middle order."""
  pre, mid, suf = ids
  return [marks.begin, *pre, marks.hole, *suf, marks.end, *mid]
