"""Lays sequences out as the arrays that the engine's programs take.

All of it is host code; rows beyond the sequences are padding.
Legend: R rows, T tokens of a chunk, n pages of a row.
"""

from collections.abc import Sequence as Several
from typing import NamedTuple

import numpy as np

from deepseek_jax.infer import sampler
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


def going(
  some: Several[Sequence], bucket: Bucket, limits: Several[int]
) -> Going:
  """Returns the last tokens of sequences, and how far they may go on."""
  token = np.zeros(bucket.rows, np.int32)
  limit = np.zeros(bucket.rows, np.int32)
  stops = np.full((bucket.rows, STOPS), -1, np.int32)
  for i, one in enumerate(some):
    token[i], limit[i] = one.buffer[one.length - 1], limits[i]
    stop = one.request.sampling.stop
    stops[i, : len(stop)] = stop
  return Going(token, limit, stops)


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
  return sampler.pack(each, [s.mask for s in some], history, vocab)
