"""Defines one line of a name table; see names.py."""

from typing import NamedTuple


class Row(NamedTuple):
  """Maps a tensor of a file to a part of one of our arrays.

  Attributes:
    ours: path below the block (or the root), with dots.
    theirs: name below the layer; '{e}' runs over the leading experts axis.
    inputs: how many axes of ours are the inputs of a matmul. Theirs is then
      [outputs, inputs] with each group of axes merged; 0: theirs is as ours.
    half: which entry of the axis after the inputs (gate 0, up 1), or None.
    fp8: the family stores it quantised.
  """

  ours: str
  theirs: str
  inputs: int = 0
  half: int | None = None
  fp8: bool = True
