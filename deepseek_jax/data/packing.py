"""Packs sequences into rows, best fit first; each stays whole.

Legend: N sequences, R rows, S tokens of a row.
"""

import bisect
import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from deepseek_jax.errors import InputError


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
  """Returns rows of sequences by number, none longer than `capacity`.

  Best fit decreasing: the longest first, each into the fullest row that still
  takes it. The result depends on the lengths alone; numbers rise in a row.

  Raises:
    InputError: a sequence is empty or longer than a row.
  """
  wrong = [n for n in lengths if not 0 < n <= capacity]
  if wrong:
    raise InputError(
      f'a sequence of {wrong[0]} tokens: must have 1 to {capacity}, the tokens'
      ' of a row'
    )
  rows: list[list[int]] = []
  rooms: list[int] = []  # that rows have left, sorted, each once
  free: dict[int, list[int]] = {}  # room left -> heap of the rows with it
  for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
    at = bisect.bisect_left(rooms, lengths[number])
    if at == len(rooms):
      room, row = capacity, len(rows)
      rows.append([])
    else:
      room = rooms[at]
      row = heapq.heappop(free[room])
      if not free[room]:
        del rooms[at], free[room]
    rows[row].append(number)
    left = room - lengths[number]
    if left not in free:
      bisect.insort(rooms, left)
      free[left] = []
    heapq.heappush(free[left], row)
  return [sorted(row) for row in rows]


def laid_out(
  sequences: Sequence[Mapping[str, np.ndarray]] | Mapping[int, Mapping],
  rows: Sequence[Sequence[int]],
  length: int,
  *,
  pad: int = 0,
) -> dict[str, np.ndarray]:
  """Returns sequences laid out in rows, with their segments and positions.

  Args:
    sequences: mappings of the same names to arrays [n ...] of one length, with
      'tokens' among them; one at least. By number, those that `rows` names
      suffice.
    rows: numbers of sequences, as `best_fit` gives them.
    length: S.
    pad: the token that fills rows up; other arrays are filled with 0.

  Returns:
    Arrays [R S ...]: those of the sequences, 'segments' (from 1; 0 is padding)
    and 'positions' (from each sequence's start), int32.
  """
  # A caller may hold those of the rows alone; rows may be padding alone.
  first = sequences[next((n for row in rows for n in row), 0)]
  out = {
    name: np.zeros((len(rows), length, *a.shape[1:]), a.dtype)
    for name, a in first.items()
  }
  out['tokens'][:] = pad
  out['segments'] = np.zeros((len(rows), length), np.int32)
  out['positions'] = np.zeros((len(rows), length), np.int32)
  for row, numbers in enumerate(rows):
    start = 0
    for segment, number in enumerate(numbers, start=1):
      sequence = sequences[number]
      end = start + len(sequence['tokens'])
      for name, array in sequence.items():
        out[name][row, start:end] = array
      out['segments'][row, start:end] = segment
      out['positions'][row, start:end] = np.arange(end - start)
      start = end
  return out
