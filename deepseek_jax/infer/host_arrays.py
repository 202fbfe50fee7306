"""Lays sequences out as the arrays that the engine's programs take.

All of it is host code; rows beyond the sequences are padding.
Legend: R rows, T tokens of a chunk, n pages of a row.
"""

from collections.abc import Sequence as Several
from typing import NamedTuple

import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.infer import sampler
from deepseek_jax.infer.checked_drafts import Foreseen
from deepseek_jax.infer.pages import SCRATCH
from deepseek_jax.infer.paging import Rows
from deepseek_jax.infer.programs import STOPS, Chunk, Going
from deepseek_jax.infer.request import Request
from deepseek_jax.infer.sampler import Draws
from deepseek_jax.infer.scheduler import Sequence


class Bucket(NamedTuple):
  """Holds the static sizes of a program's arrays."""

  rows: int  # R
  tokens: int  # T; of decoding 1
  pages: int  # n


def rows(some: Several[Sequence], bucket: Bucket, counts: Several[int]) -> Rows:
  """Returns where sequences are cached; `counts` tokens are added to each."""
  more = [0] * (bucket.rows - len(some))
  fill = lambda values: np.array([*values, *more], np.int32)
  table = np.full((bucket.rows, bucket.pages), SCRATCH, np.int32)
  for row, one in zip(table, some):
    row[: len(one.pages)] = one.pages[: bucket.pages]
  return Rows(
    fill(s.slot for s in some),
    table,
    fill(s.cached for s in some),
    fill(counts),
  )


def chunk(
  some: Several[Sequence],
  bucket: Bucket,
  counts: Several[int],
  drafts: int,
  echo: bool = False,
) -> Chunk:
  """Returns the next `counts` tokens of sequences, and those about them."""
  tokens = np.zeros((2, bucket.rows, bucket.tokens), np.int32)
  before = np.zeros((bucket.rows, drafts), np.int32)
  for i, (one, count) in enumerate(zip(some, counts)):
    span = one.buffer[one.cached : one.cached + count + 1]
    tokens[0, i, :count] = span[:count]
    tokens[1, i, : len(span) - 1] = span[1:]
    if drafts:
      last = one.buffer[max(0, one.cached - drafts) : one.cached]
      before[i, drafts - len(last) :] = last
  return Chunk(*tokens, before, np.bool_(echo))


class Ahead(NamedTuple):
  """Holds how a decoding step looks ahead."""

  calls: int  # of the model at most
  drafts: int  # k of the bucket
  words: int  # int32s of what a grammar allows
  foreseen: np.ndarray | None = None  # [R k] drafts that grammars have read
  allowed: Several[Several[np.ndarray]] = ()  # of each row, after each draft


def going(
  some: Several[Sequence],
  bucket: Bucket,
  limits: Several[int],
  ahead: Ahead,
) -> Going:
  """Returns the last tokens of sequences, and how far they may go on."""
  token = np.zeros(bucket.rows, np.int32)
  limit = np.zeros(bucket.rows, np.int32)
  stops = np.full((bucket.rows, STOPS), -1, np.int32)
  for i, one in enumerate(some):
    token[i], limit[i] = one.buffer[one.length - 1], limits[i]
    stop = one.request.sampling.stop
    stops[i, : len(stop)] = stop
  drafts = np.zeros((bucket.rows, ahead.drafts), np.int32)
  if ahead.foreseen is not None:
    drafts = ahead.foreseen
  allowed = np.full((bucket.rows, ahead.drafts, ahead.words), -1, np.int32)
  for row, masks in zip(allowed, ahead.allowed):
    for place, mask in zip(row, masks):
      place[:] = mask
  there = np.bool_(ahead.foreseen is not None)
  foreseen = Foreseen(there, drafts, allowed)
  return Going(token, limit, stops, np.int32(ahead.calls), foreseen)


def look_ahead(
  some: Several[Sequence],
  drafts: np.ndarray,
  limits: Several[int],
  ahead: Ahead,
) -> tuple[Ahead, list[int]]:
  """Lets grammars read drafts: what they allow after each.

  Args:
    some: sequences.
    drafts: [R k] int32.
    limits: tokens that each may draw.
    ahead: of the step.

  Returns:
    The same with the drafts, and the limits: a row draws no token at a place of
    which its grammar does not know what may come.
  """
  allowed, most = [], []
  for one, row, limit in zip(some, drafts, limits):
    if one.matcher is None:
      allowed.append([])
      most.append(limit)
      continue
    allowed.append(_after(one, row))
    most.append(min(limit, 1 + len(allowed[-1])))
  return ahead._replace(foreseen=drafts, allowed=allowed), most


def _after(one: Sequence, drafts: np.ndarray) -> list[np.ndarray]:
  """Returns what a sequence's grammar allows after each of its drafts.

  The list ends before the first that it does not allow, or that ends it.
  """
  out: list[np.ndarray] = []
  try:
    matcher = one.matcher.copy()
    for token in map(int, drafts):
      if not matcher.accept(token) or matcher.ended:
        break
      out.append(matcher.mask())
  except InputError:  # it gives up here; if the answer gets there, it ends
    pass
  return out


def draws(
  some: Several[Sequence], bucket: Bucket, page: int, vocab: int
) -> Draws:
  """Returns how tokens of sequences are drawn, [R ...]."""
  history = np.zeros((bucket.rows, bucket.pages * page), np.int32)
  for row, one in zip(history, some):
    length = min(one.length, len(row))
    row[:length] = one.buffer[:length]
  each = [s.settings for s in some]
  if not each:
    each = [sampler.settings(Request((0,)), 0, vocab)]
  return sampler.pack(each, [s.allowed for s in some], history, vocab)
